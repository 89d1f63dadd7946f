"""Measure, and print tables in Markdown: python tests/bench.py [step|memory|loop|prepare] ...

Machines are noisy, so the figures to compare are ratios of medians over interleaved rounds of one run. BENCH_CONFIG and
BENCH_SEQUENCES choose model and batch of all but `prepare`; BENCH_STEPS, a regular expression, the rows of `step` and
`memory`; BENCH_MEGABYTES the text of `prepare`. Steps are in bfloat16 on CUDA, and in float32 on a CPU.
"""

import datetime
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from helpers import ROOT, words_json

import prepare_data
import train
from models import GPT2, MODEL_CLASSES, GPT2Config
from run_info import read_metrics

CONFIG = os.environ.get("BENCH_CONFIG", "configs/ss_llama_simple_mlp-2L-128.yaml")
SEQUENCES = int(os.environ.get("BENCH_SEQUENCES", 16))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", 3))
MEGABYTES = int(os.environ.get("BENCH_MEGABYTES", 200))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def medians(ways: dict, rounds: int, times: int = 1) -> dict[str, float]:
    """{name: function} -> the median seconds of a call, over interleaved rounds, the first of which may compile."""
    took = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            for _ in range(times):
                way()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            took[name].append((time.perf_counter() - began) / times)
    return {name: statistics.median(t) for name, t in took.items()}


def table(title: str, columns: list[str], rows: dict[str, list[float]]) -> None:
    """Print {what: its figures}, and on which machine and when they were measured."""
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{prepare_data.available_cpus()} CPU cores"
    print(f"\n{title}: {machine}, torch {torch.__version__}, {datetime.date.today()}\n")
    print(f"| | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}")
    for what, figures in rows.items():
        cells = [f"{figure:,.0f}" if figure >= 10 else f"{figure:.2f}" for figure in figures if figure]
        print(f"| {what} | {' | '.join(cells)} |", flush=True)


# -----------------------------------------------------------------------------
# one training step

OURS, PRODUCTS = "models.py", "its matrix products alone"
SPD = "models.py, all logits, explicit attention"  # as SPD's YAML asks for, compiled
NANOGPT = "nanoGPT's"  # GPT-2 of this shape, its vocabulary padded to a multiple of 64, all logits
LLAMA = "transformers' Llama"
KINDS = [OURS, f"{OURS}, all logits", SPD, NANOGPT, *([LLAMA] if importlib.util.find_spec("transformers") else [])]
STEPS = [kind + how for kind in KINDS for how in ("", ", compiled")]
STEPS = [name for name in STEPS if name == OURS or re.search(os.environ.get("BENCH_STEPS", ""), name)]


def transformers_llama(c):
    """transformers' Llama of the shape `c`. Its SwiGLU has three matrices, so it gets 2/3 of the MLP's width."""
    import transformers

    shape = {"hidden_size": c.n_embd, "intermediate_size": 2 * c.n_intermediate // 3, "vocab_size": c.vocab_size}
    shape |= {"num_attention_heads": c.n_head, "num_key_value_heads": c.n_key_value_heads, "use_cache": False}
    shape |= {"num_hidden_layers": c.n_layer, "max_position_embeddings": c.block_size, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


class Step:
    """One update of the model `name` of STEPS on one batch: forward, backward, clipping and fused AdamW."""

    def __init__(self, name: str):
        train.keep_freed_memory()  # as a run has it
        self.kind = name.removesuffix(", compiled")
        self.c = c = train.load_config(ROOT / CONFIG).model
        c.flash_attention = self.kind != SPD
        if self.kind == NANOGPT:
            model = GPT2(GPT2Config("GPT2", c.block_size, -(-c.vocab_size // 64) * 64, c.n_layer, c.n_head, c.n_embd))
        else:
            model = transformers_llama(c) if self.kind == LLAMA else MODEL_CLASSES[c.model_type](c)
        self.model = model.to(DEVICE)
        self.forward = torch.compile(model, dynamic=False) if name.endswith("compiled") else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        self.x = torch.randint(0, c.vocab_size, (SEQUENCES, c.block_size), device=DEVICE)

    def __call__(self) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            if self.kind == LLAMA:
                loss = self.forward(input_ids=self.x, labels=self.x).loss
            else:
                loss = self.forward(self.x, self.x, return_logits=self.kind != OURS)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def matrix_products(model, c):
    """A function: the matrix products of a step, forward and backward, attention's too, into memory that is there."""
    N, T, heads, hs = SEQUENCES * c.block_size, c.block_size, SEQUENCES * c.n_head, c.n_embd // c.n_head
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    # Columns are padded to a multiple of 64: on CUDA the vocabulary would miss the fast kernels.
    sizes = [(1, N, m.in_features, -(-m.out_features // 64) * 64) for m in linears]
    sizes += c.n_layer * [(heads, T, hs, T), (heads, T, T, hs)]
    new = partial(torch.empty, device=DEVICE, dtype=DTYPE)
    shapes = [((n, rows, inner), (n, inner, columns), (n, rows, columns)) for n, rows, inner, columns in sizes]
    products = [[new(shape).normal_() for shape in (a, b, ab, a, b)] for a, b, ab in shapes]

    def step():
        for a, b, ab, grad_a, grad_b in products:  # ab stands for its own gradient, too
            torch.bmm(a, b, out=ab)
            torch.bmm(ab, b.mT, out=grad_a)
            torch.bmm(a.mT, ab, out=grad_b)

    return step


def bench_step(_) -> None:
    """Tokens a second of a training step, and what part of the device's rate of large matrix products that is."""
    ways = {name: Step(name) for name in STEPS}
    ours = ways[OURS]
    ways[PRODUCTS] = matrix_products(ours.model, ours.c)
    took = medians(ways, 3 * ROUNDS + 2, times=10 if DEVICE == "cuda" else 1)
    peak = train.matrix_rate(torch.device(DEVICE), DTYPE) / ours.model.flops_per_token()  # tokens/s
    n = ours.x.numel()
    rows = {name: [n / t, t / took[OURS], took[PRODUCTS] / t, n / t / peak] for name, t in took.items()}
    title = f"A step of {CONFIG}, {SEQUENCES} sequences of {ours.c.block_size}, {str(DTYPE)[6:]}"
    table(title, ["tokens/s", "models.py over it", "of its products alone", "MFU"], rows)


def peak_of(name: str) -> float:
    """The peak memory of a step in MB: on CUDA of what is allocated, on a CPU of the whole process."""
    step = Step(name)
    step()  # compiles
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use now
    step()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3


def bench_memory(_) -> None:
    """Peak memory of a step, each in a process of its own; on CUDA four at a time, since most of it is compiling."""
    with multiprocessing.get_context("spawn").Pool(4 if DEVICE == "cuda" else 1, maxtasksperchild=1) as pool:
        peaks = dict(zip(STEPS, pool.map(peak_of, STEPS, chunksize=1)))
    rows = {name: [peak, peaks[OURS] / peak] for name, peak in peaks.items()}
    table(f"A step of {CONFIG}, {SEQUENCES} sequences", ["peak MB", "models.py over it"], rows)


# -----------------------------------------------------------------------------
# train.py


def random_shards(folder: Path, vocab_size: int) -> list[str]:
    """Write shards of random ids, and a tokenizer, without a network: the overrides that only train on them."""
    header, n_tokens = np.zeros(256, "<i4"), 1 << 20
    header[:3] = prepare_data.MAGIC, prepare_data.VERSION, n_tokens
    ids = (vocab_size * np.random.default_rng(0).random(n_tokens) ** 3).astype("<u2")  # some ids are frequent
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(header.tobytes() + ids.tobytes())
    (folder / "tokenizer.json").write_text(words_json([]))
    data = {"path": folder, "hf_tokenizer_path": folder / "tokenizer.json", "train_tokenizer_vocab_size": "null"}
    overrides = [f"{split}_dataset_config.{key}={data[key]}" for split in ("train", "val") for key in data]
    overrides += ["val_loss_every=0", "sample_every=0", "resume_every=0", "intermediate_checkpoints=false"]
    return [*overrides, "optimizer=adamw", "muon_learning_rate=null", "micro_batch_size=null"]


def bench_loop(folder: Path) -> None:
    """train.py, by its own tokens/s, against the same step again and again on one batch; compiled on CUDA alone."""
    name, dtype = (f"{OURS}, compiled", "bfloat16") if DEVICE == "cuda" else (OURS, "float32")
    step = Step(name)
    options = [*random_shards(folder, step.c.vocab_size), f"batch_size={SEQUENCES}", f"dtype={dtype}"]
    options += [f"compile={DEVICE == 'cuda'}", "num_iterations=60", "train_log_every=30"]
    bare, loop = [], []
    for i in range(ROUNDS):
        bare.append(step.x.numel() / medians({name: step}, 5, times=6)[name])
        command = [sys.executable, ROOT / "train.py", ROOT / CONFIG, *options, f"run_dir={folder / str(i)}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        loop.append(read_metrics(folder / str(i) / "metrics.jsonl")[-1]["tokens_per_s"])  # of the last 30 updates
    rates = {f"a bare step of {name}": statistics.median(bare), "train.py": statistics.median(loop)}
    rows = {what: [rate, rate / statistics.median(bare)] for what, rate in rates.items()}
    title = f"The loop on {CONFIG}, {SEQUENCES} sequences, {dtype}, medians of {ROUNDS} rounds"
    table(title, ["tokens/s", "of the bare step"], rows)


# -----------------------------------------------------------------------------
# prepare_data.py


def prepare(folder: Path, section: dict, memory: list[float]) -> None:
    """Run prepare_data.py, as a user does, into a new folder; append samples of all its processes' MB to `memory`."""
    section = {"path": f"out{time.monotonic_ns()}", "n_ctx": 513, "hf_tokenizer_path": "gpt2"} | section
    sections = {"train_dataset_config": section, "val_dataset_config": section | {"split": "train[:1]"}}
    (folder / "c.yaml").write_text(json.dumps(sections))
    command = [sys.executable, ROOT / "prepare_data.py", "c.yaml"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True)
    ps = ["ps", "-o", "pss=", "-s", str(process.pid)]  # of the session; PSS: a page that processes share counts once
    while process.poll() is None:
        memory.append(sum(map(int, subprocess.run(ps, capture_output=True).stdout.split())) / 1e3)
        time.sleep(0.1)
    assert process.returncode == 0


def bench_prepare(folder: Path) -> None:
    """prepare_data.py's rate for each kind of source, against the encoder alone on as many cores."""
    import datasets

    datasets.disable_progress_bars()
    source = "".join(path.read_text(errors="replace") for path in prepare_data.stdlib_files())
    texts = [source[i : i + 3000].strip() or "pass" for i in range(0, len(source), 3000)]
    texts *= round(1 + MEGABYTES * 1e6 / len(source))
    encoder, workers = prepare_data.load_encoder("gpt2"), prepare_data.available_cpus()
    ids = np.concatenate([[*row, encoder.eos_token_id] for row in encoder.encode_batch(texts)])

    (folder / "docs.txt").write_text("\n<|endoftext|>\n".join(texts))
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "docs.parquet")
    datasets.Dataset.from_dict({"ids": np.split(ids, range(513, len(ids), 513))}).to_parquet(folder / "ids.parquet")
    sections = {kind: {"name": f"docs.{kind}"} for kind in ("jsonl", "txt", "parquet")}
    sections["parquet of tokenized rows"] = {"name": "ids.parquet", "column_name": "ids", "is_tokenized": True}

    share = texts[: len(texts) // workers]  # what one of several workers gets
    alone, memory = "the encoder alone", {kind: [] for kind in sections}
    ways = {alone: lambda: [encoder.encode_batch(share[i : i + 64]) for i in range(0, len(share), 64)]}
    ways |= {kind: partial(prepare, folder, section, memory[kind]) for kind, section in sections.items()}
    took, memory[alone] = medians(ways, ROUNDS), [0]
    rows = {kind: [len(ids) / t, took[alone] / t, max(memory[kind])] for kind, t in took.items()}
    title = f"Preparing {len(texts):,} documents, {len(ids):,} tokens of gpt2, {workers} workers"
    table(title, ["tokens/s", "of the encoder alone", "peak MB, all processes"], rows)


BENCHMARKS = {"step": bench_step, "memory": bench_memory, "loop": bench_loop, "prepare": bench_prepare}

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))
