"""Measure: python tests/bench.py [step|memory|loop|loader|prepare|start] ...

Machines are noisy, so the figures to compare are ratios of medians from interleaved rounds of one run. `step` and
`memory` take their model from BENCH_CONFIG and their batch from BENCH_SEQUENCES; `prepare` takes BENCH_TOKENIZER and
BENCH_MEGABYTES of text made of the standard library's source files. On CUDA, steps are in bfloat16.
"""

import importlib.util
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import yaml

import prepare_data
import train
from models import MODEL_CLASSES

ROUNDS, STEP_ROUNDS, LOADER_ROUNDS, LOOP_UPDATES = 3, 7, 30, 60
ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
CONFIG = os.environ.get("BENCH_CONFIG", "configs/ss_llama_simple_mlp-2L-128.yaml")
SEQUENCES = int(os.environ.get("BENCH_SEQUENCES", 16))
TOKENIZER = os.environ.get("BENCH_TOKENIZER", "gpt2")
MEGABYTES = int(os.environ.get("BENCH_MEGABYTES", 200))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def medians(ways: dict, rounds: int, warm_up: int = 0) -> dict[str, float]:
    """The median seconds of each of {name: function} over interleaved rounds, after some that are not counted."""
    times = {name: [] for name in ways}
    for _ in range(warm_up + rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t[warm_up:]) for name, t in times.items()}


def table(title: str, figures: dict[str, float], unit: str) -> None:
    """Print {what: figure}, each with its ratio over the first; `unit` is a format such as "{:.1f} ms"."""
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{prepare_data.available_cpus()} CPU cores"
    print(f"\n{title}\n{machine}, Python {platform.python_version()}, torch {torch.__version__}\n")
    print(f"{'ratio':>82}")
    first = next(iter(figures.values()))
    for what, figure in figures.items():
        print(f"  {what:<54}{unit.format(figure):>18}{figure / first:>8.2f}")


# -----------------------------------------------------------------------------
# one training step

OURS = "models.py"
SPD = f"{OURS}, explicit attention, all logits, compiled"  # as SPD's YAML asks for
STEPS = [OURS, f"{OURS}, compiled", f"{OURS}, all logits", f"{OURS}, all logits, compiled", SPD]
STEPS += ["transformers' LlamaForCausalLM", "transformers' LlamaForCausalLM, compiled"]


def transformers_llama(c):
    """transformers' Llama of the shape `c`. Its SwiGLU has three matrices, so it gets 2/3 of the MLP's width."""
    import transformers

    shape = {"hidden_size": c.n_embd, "intermediate_size": 2 * c.n_intermediate // 3, "vocab_size": c.vocab_size}
    shape |= {"num_attention_heads": c.n_head, "num_key_value_heads": c.n_key_value_heads, "use_cache": False}
    shape |= {"num_hidden_layers": c.n_layer, "max_position_embeddings": c.block_size, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


class Step:
    """One update of the model `name` of STEPS on one batch: forward, backward, clipping and fused AdamW."""

    def __init__(self, name: str, changes: list[str], sequences: int, config=CONFIG, device: str = DEVICE):
        self.c = c = train.load_config(ROOT / config, changes).model
        c.flash_attention = name != SPD
        self.device = device
        self.ours = name.startswith(OURS)
        self.return_logits = "all logits" in name
        self.model = MODEL_CLASSES[c.model_type](c) if self.ours else transformers_llama(c)
        self.model.to(device)
        self.forward = torch.compile(self.model, dynamic=False) if name.endswith("compiled") else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.x = torch.randint(0, c.vocab_size, (sequences, c.block_size), device=device)

    def __call__(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            if self.ours:
                loss = self.forward(self.x, self.x, return_logits=self.return_logits)[1]
            else:
                loss = self.forward(input_ids=self.x, labels=self.x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def bench_step(_) -> None:
    """Tokens a second of a training step."""
    has_transformers = importlib.util.find_spec("transformers") is not None
    steps = {name: Step(name, [], SEQUENCES) for name in STEPS if has_transformers or name.startswith(OURS)}
    ours, took = steps[OURS], medians(steps, STEP_ROUNDS, warm_up=2)
    rates = {name: ours.x.numel() / t for name, t in took.items()}
    rates["large matrix products"] = train.matrix_rate(torch.device(DEVICE), DTYPE) / ours.model.flops_per_token()
    what = f"{SEQUENCES} sequences of {ours.c.block_size}, {str(DTYPE)[6:]}, medians of {STEP_ROUNDS} rounds"
    table(f"a step of {CONFIG}, {what}", rates, "{:,.0f} tokens/s")


def peak_of(name: str, changes: list[str], sequences: int) -> float:
    """The peak memory of a step in MB, in a process of its own."""
    step = Step(name, changes, sequences)
    step()
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use now: compiling does not count
    step()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3


def bench_memory(_) -> None:
    """Peak memory of a step with a vocabulary of 50,277, of the whole process (on a GPU: all that is allocated)."""
    peaks, changes = {}, ["model.vocab_size=50277"]
    for name in STEPS[:4]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(peak_of, (name, changes, SEQUENCES // 2))
    table(f"peak memory of a step of {CONFIG}, {changes[0]}, {SEQUENCES // 2} sequences", peaks, "{:,.0f} MB")


# -----------------------------------------------------------------------------
# train.py


def quickstart(folder: Path) -> list[str]:
    """Prepare the quick start's data in `folder`: the overrides that train on it, without evaluation or saving."""
    paths = [f"{split}_dataset_config.path={folder / 'data'}" for split in ("train", "val")]
    subprocess.run([sys.executable, ROOT / "prepare_data.py", QUICKSTART, *paths], check=True, capture_output=True)
    quiet = ["val_loss_every=0", "sample_every=0", "resume_every=0", "intermediate_checkpoints=false", "compile=false"]
    adamw = ["optimizer=adamw", "muon_learning_rate=null", "warmup_iters=0", "device=cpu"]
    return [*paths, *quiet, *adamw, f"num_iterations={LOOP_UPDATES}"]


def trained(folder: Path, options: list[str], ranks: int = 1, **env) -> tuple[list[float], float]:
    """A run of the quick start in `folder`: (times at which updates' lines appeared, the tokens/s it reports last)."""
    folder = folder / f"run {time.monotonic_ns()}"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [ROOT / "train.py", QUICKSTART, *options, f"run_dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    seen = [time.monotonic() for line in process.stdout if line.startswith("step ")]
    if process.wait():
        sys.exit(f"bench: {' '.join(map(str, command))} failed")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return seen, metrics[-1].get("tokens_per_s", 0.0)


def bare_rate(overrides: list[str]) -> float:
    """Tokens/s of the same updates without train.py's loop."""
    step = Step(OURS, overrides, train.load_config(QUICKSTART, overrides).batch_size, QUICKSTART, "cpu")
    took = [timeit.timeit(step, number=LOOP_UPDATES // 2) for _ in range(2)]
    return LOOP_UPDATES // 2 * step.x.numel() / took[1]


def bench_loop(folder: Path) -> None:
    """train.py's own tokens/s against the bare step, with two ranks against two threads, and with checkpoints."""
    options = quickstart(folder)
    half = [*options, f"train_log_every={LOOP_UPDATES // 2}"]
    saving = [*options, "train_log_every=1", "checkpoint_every=10", "keep_optimizer=true"]
    bare, loop, two = "the bare step, all threads", "train.py, all threads", "train.py, 2 ranks of 1 thread"
    plain, saved = "an update", "an update after which both files are saved"
    rates, times = {bare: [], loop: [], two: []}, {plain: [], saved: []}
    for _ in range(ROUNDS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, as train.py has
            rates[bare].append(pool.apply(bare_rate, (options,)))
        rates[loop].append(trained(folder, half)[1])
        rates[two].append(trained(folder, half, 2, OMP_NUM_THREADS="1")[1])
        took = 1000 * np.diff(trained(folder, saving)[0])  # took[i]: update i + 2, after the saving of update i + 1
        times[saved] += took[9 : LOOP_UPDATES - 2 : 10].tolist()
        times[plain] += np.delete(took, slice(9, None, 10)).tolist()
    title = f"the loop, on the quick start's model and data, not compiled, medians of {ROUNDS} rounds"
    table(title, {name: statistics.median(r) for name, r in rates.items()}, "{:,.0f} tokens/s")
    table(title, {name: statistics.median(t) for name, t in times.items()}, "{:.1f} ms")


def bench_start(folder: Path) -> None:
    """From the command to its effect: imports, the first update, the first compiled update twice."""
    options = [*quickstart(folder), "num_iterations=1"]
    ways, times = {}, {}
    for code in ("import torch", "import models", "import run_info"):
        ways[code] = partial(subprocess.run, [sys.executable, "-c", code], check=True, cwd=ROOT)
    for i in range(ROUNDS):
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache{i}")}
        for name in ("first update", "first update, compiled, no cache", "first update, compiled, from the cache"):
            began = time.monotonic()
            first = trained(folder, [*options, f"compile={'compiled' in name}"], **cache)[0][0]
            times.setdefault(f"train.py to its {name}", []).append(first - began)
    took = medians(ways, ROUNDS) | {name: statistics.median(t) for name, t in times.items()}
    table(f"the start, medians of {ROUNDS} rounds", took, "{:.2f} s")


# -----------------------------------------------------------------------------
# data


def bench_loader(folder: Path) -> None:
    """A batch of 1,024 windows of 513 tokens, shuffled, from 3 and from 3,000 shards of 100M tokens (sparse files)."""
    section = prepare_data.DatasetConfig(name="x", n_ctx=513)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 100_000_000
    ways = {}
    for n in (3, 3000):
        (folder / str(n)).mkdir()
        for i in range(n):
            with open(folder / str(n) / f"train_{i:06d}.bin", "wb") as f:
                f.write(header.tobytes())
                f.truncate(header.nbytes + 200_000_000)
        stream = prepare_data.TrainingStream(prepare_data.Shards(folder / str(n), "train", ""), section, 0)
        ways[f"{n:,} shards"] = partial(stream.read, np.arange(1024))
    took = {name: 1000 * t for name, t in medians(ways, LOADER_ROUNDS, warm_up=1).items()}
    table(f"a batch, order included, from warm files, medians of {LOADER_ROUNDS} rounds", took, "{:.1f} ms")


def stdlib_texts() -> list[str]:
    """About MEGABYTES of pieces of the standard library."""
    rng, texts, size = random.Random(0), [], 0
    sources = [p.read_text(encoding="utf-8", errors="replace") for p in prepare_data.stdlib_files()]
    while size < MEGABYTES * 1e6:
        source = rng.choice(sources)
        start = rng.randrange(max(1, len(source) - 3000))
        texts.append(source[start : start + rng.randint(500, 6000)].strip() or "pass")
        size += len(texts[-1])
    return texts


def prepare(folder: Path, workers: int) -> None:
    """Run prepare_data.py, as a user does, into a folder that is deleted again."""
    section = {"name": str(folder / "docs.jsonl"), "path": str(folder / "out"), "n_ctx": 513}
    section |= {"hf_tokenizer_path": TOKENIZER}
    sections = {"train_dataset_config": section, "val_dataset_config": section | {"split": "train[:1]"}}
    (folder / "c.yaml").write_text(yaml.safe_dump(sections))
    command = [sys.executable, ROOT / "prepare_data.py", folder / "c.yaml", "--workers", str(workers)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(folder / "out")


def usual(folder: Path, encoder, workers: int) -> None:
    """What most scripts do: datasets.map in batches, then write the ids."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=prepare_data.text_tokenizer(encoder.json))
    data = {"data_files": str(folder / "docs.jsonl"), "cache_dir": str(folder / "cache"), "split": "train"}
    options = {"batched": True, "num_proc": workers, "remove_columns": ["text"]}
    rows = datasets.load_dataset("json", **data)
    rows = rows.map(lambda batch: {"ids": tok(batch["text"])["input_ids"]}, **options)
    with open(folder / "usual.bin", "wb") as f:
        for batch in rows.iter(batch_size=1000):
            f.write(np.concatenate([[*ids, encoder.eos_token_id] for ids in batch["ids"]]).astype(np.uint16).tobytes())
    shutil.rmtree(folder / "cache")


def bench_prepare(folder: Path) -> None:
    """prepare_data.py against the encoder alone, and against datasets.map."""
    texts, workers = stdlib_texts(), prepare_data.available_cpus()
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    encoder = prepare_data.load_encoder(TOKENIZER)
    tokens = sum(map(len, encoder.encode_batch(texts))) + len(texts)
    share = texts[: len(texts) // workers]  # what one of several workers gets
    chunks = [share[i : i + 64] for i in range(0, len(share), 64)]
    ways = {"prepare_data.py": partial(prepare, folder, workers)}
    ways["the encoder alone, on as many cores"] = lambda: [encoder.encode_batch(chunk) for chunk in chunks]
    if importlib.util.find_spec("datasets") and importlib.util.find_spec("transformers"):
        ways["datasets.map, batched, as many processes"] = partial(usual, folder, encoder, workers)
    rates = {what: tokens / t for what, t in medians(ways, ROUNDS).items()}
    title = f"preparing {len(texts):,} documents, {tokens:,} tokens, {TOKENIZER}, {workers} workers"
    table(title, rates, "{:,.0f} tokens/s")


BENCHMARKS = {"step": bench_step, "memory": bench_memory, "loop": bench_loop}
BENCHMARKS |= {"loader": bench_loader, "prepare": bench_prepare, "start": bench_start}


def main() -> None:
    for name in sys.argv[1:] or BENCHMARKS:
        if name not in BENCHMARKS:
            sys.exit(f"bench: no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
