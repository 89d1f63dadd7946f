"""Measure: python tests/bench.py [step|memory|loop|loader|prepare|start] ...

Every figure is a ratio of medians from interleaved rounds in one run, since machines are noisy. `prepare` generates its
own text, so the rates are those of that text on this machine. `step` and `memory` take a model from BENCH_CONFIG.
"""

import contextlib
import io
import itertools
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
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import prepare_data
import train
from models import BF16_CPU, MODEL_CLASSES

ROUNDS, MEGABYTES, STEP_ROUNDS, BATCHES = 3, 200, 7, 30
ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def machine() -> str:
    """One line that says what was measured on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def table(title: str, rows: list[tuple[str, str, str]], rounds: int = ROUNDS) -> None:
    print(f"\n{title}\n{machine()}, medians of {rounds} interleaved rounds\n")
    for row in [("", "rate", "ratio"), *rows]:
        print(f"  {row[0]:<52}{row[1]:>18}{row[2]:>8}")


def stdlib_documents(folder: Path) -> tuple[Path, list[str]]:
    """A .jsonl of about MEGABYTES made of shuffled pieces of the standard library, and its texts."""
    rng, texts, size = random.Random(0), [], 0
    sources = [p.read_text(encoding="utf-8", errors="replace") for p in prepare_data.stdlib_files()]
    while size < MEGABYTES * 1e6:
        source = rng.choice(sources)
        start = rng.randrange(max(1, len(source) - 3000))
        texts.append(source[start : start + rng.randint(500, 6000)])
        size += len(texts[-1])
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path, texts


def bench_prepare(folder: Path, tokenizer: str, workers: int) -> None:
    """prepare_data.py against the encoder alone, and against datasets.map followed by writing the ids."""
    corpus, texts = stdlib_documents(folder)
    encoder = prepare_data.load_encoder(tokenizer)

    def encoded(texts) -> int:
        chunks = (texts[i : i + 64] for i in range(0, len(texts), 64))
        return sum(len(ids) + 1 for chunk in chunks for ids in encoder.encode_batch(chunk))

    one_core = texts[: len(texts) // workers]  # as much text for one core as each of several has
    tokens, share, in_quarter = encoded(texts), encoded(one_core), encoded(texts[: len(texts) // 4])
    quarter = folder / "quarter.jsonl"  # enough for datasets.map, which takes its time
    with open(corpus) as f:
        quarter.write_text("".join(itertools.islice(f, len(texts) // 4)))

    def ours():
        section = {"name": str(corpus), "hf_tokenizer_path": tokenizer, "n_ctx": 513, "path": str(folder / "ours")}
        config = {"train_dataset_config": section, "val_dataset_config": section | {"split": "train[:1]"}}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare_data.prepare(prepare_data.dataset_configs(config), None, workers, 100_000_000)
        shutil.rmtree(folder / "ours")

    def bare():
        encoded(one_core)

    def usual(**options):
        import datasets
        import transformers
        from tokenizers import Tokenizer

        datasets.disable_progress_bars()
        tok = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(encoder.json.decode()))
        eos = [encoder.eos_token_id]

        def encode(row):
            ids = tok(row["text"], add_special_tokens=False)["input_ids"]
            return {"ids": [i + eos for i in ids] if "batched" in options else ids + eos}

        rows = datasets.load_dataset("json", data_files=str(quarter), split="train", cache_dir=str(folder / "cache"))
        rows = rows.map(encode, remove_columns=["text"], **options)
        with open(folder / "usual.bin", "wb") as f:
            for batch in rows.iter(batch_size=1000):
                f.write(np.concatenate(batch["ids"]).astype(np.uint16).tobytes())
        shutil.rmtree(folder / "cache")

    ways = {"ours": ours, "bare": bare, "map": usual, "batched": lambda: usual(batched=True, num_proc=workers)}
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            with contextlib.suppress(ImportError):
                times[name].append(seconds(way))
    amount = {"ours": tokens, "bare": share, "map": in_quarter, "batched": in_quarter}
    rate = {name: amount[name] / statistics.median(t) for name, t in times.items() if t}
    rate["bare"] *= workers
    labels = {
        "ours": f"prepare_data.py, {workers} workers",
        "bare": f"{workers} x the encoder alone on one core",
        "map": "datasets.map as it comes, then writing ids",
        "batched": f"datasets.map, batched, {workers} processes, then writing",
    }
    rows = [(labels[name], f"{r:,.0f} tok/s", f"{rate['ours'] / r:.2f}") for name, r in rate.items()]
    table(f"preparing {len(texts):,} documents, {tokens:,} tokens, with {tokenizer}; ratio: ours over it", rows)


def bench_loader(folder: Path) -> None:
    """A batch of 1,024 windows of 513 tokens in shuffled order, from 3 and from 3,000 shards of 100M (sparse files)."""
    shards = {}
    for n in (3, 3000):
        (folder / str(n)).mkdir()
        header = np.zeros(256, "<i4")
        header[:3] = prepare_data.MAGIC, prepare_data.VERSION, 100_000_000
        for i in range(n):
            with open(folder / str(n) / f"train_{i:06d}.bin", "wb") as f:
                f.write(header.tobytes())
                f.truncate(prepare_data.HEADER_BYTES + 200_000_000)
        took = seconds(lambda n=n: shards.update({n: prepare_data.Shards(folder / str(n), "train", "")}))
        print(f"opening {n:,} shards: {1000 * took:.0f} ms")

    times = {n: [] for n in shards}
    for epoch in range(BATCHES):
        for n, data in shards.items():
            positions = np.arange(epoch * 1024, (epoch + 1) * 1024)
            batch = prepare_data.window_order(positions, data.n_tokens // 513, 0)
            data.windows(batch, 513)  # the page cache is warm after this
            began = time.perf_counter()
            data.windows(prepare_data.window_order(positions, data.n_tokens // 513, 0), 513)
            times[n].append(time.perf_counter() - began)
    medians = {n: statistics.median(t) for n, t in times.items()}
    rows = [(f"{n:,} shards", f"{1000 * t:.1f} ms", f"{t / medians[3]:.2f}") for n, t in medians.items()]
    table("a batch of 1,024 windows of 513 tokens, order included", rows, BATCHES)


# -----------------------------------------------------------------------------
# one training step

BF16 = torch.cuda.is_available() or BF16_CPU  # float32 where there are no units for it
SHIPPED = "models.py in float32, explicit, logits kept, compiled"  # SPD's YAML asks for that
BENCH_CONFIG = os.environ.get("BENCH_CONFIG", "configs/ss_llama_simple_mlp-2L-128.yaml")


def training_step(name: str, changes: list[str], sequences: int):
    """A function that makes one update of the model `name`; "... compiled" is under torch.compile.

    All have BENCH_CONFIG's shape with `changes`, clipping and fused AdamW. A SwiGLU has three matrices where a GELU MLP
    has two, so transformers' Llama gets 2/3 of its width.
    """
    c = train.load_config(ROOT / BENCH_CONFIG, changes).model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randint(0, c.vocab_size, (sequences, c.block_size), device=device)
    if name.startswith("models.py"):
        model = MODEL_CLASSES[c.model_type](c)
        keep = "logits kept" in name

        def loss_of(f):
            return f(x, x, return_logits=keep)[1]
    else:
        import transformers

        if "Llama" in name:
            shape = {
                "hidden_size": c.n_embd,
                "intermediate_size": 2 * c.n_intermediate // 3,
                "num_hidden_layers": c.n_layer,
            }
            shape |= {"num_attention_heads": c.n_head, "num_key_value_heads": c.n_key_value_heads}
            shape |= {"max_position_embeddings": c.block_size, "tie_word_embeddings": True}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=c.vocab_size, **shape))
        else:
            shape = {"n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
            shape |= {
                "resid_pdrop": 0,
                "embd_pdrop": 0,
                "attn_pdrop": 0,
                "n_inner": c.n_intermediate,
                "bos_token_id": 0,
                "eos_token_id": 0,
            }
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=c.vocab_size, **shape))
        model.config.use_cache = False

        def loss_of(f):
            return f(input_ids=x, labels=x).loss

    model.to(device)
    forward = torch.compile(model, dynamic=False) if name.endswith("compiled") else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=BF16 and name != SHIPPED):
            loss = loss_of(forward)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step, model, c


def bare_products(model, c, sequences: int):
    """The step's matrix products alone, into memory that is there already: forward, and twice that backward."""
    device = next(model.parameters()).device
    dtype = torch.bfloat16 if BF16 else torch.float32
    N, T, heads = sequences * c.block_size, c.block_size, sequences * c.n_head
    sizes = [(1, N, m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    sizes += c.n_layer * [(heads, T, c.n_embd // c.n_head, T), (heads, T, T, c.n_embd // c.n_head)]

    def tensor(*shape):
        return torch.randn(shape, device=device, dtype=dtype)

    products = [
        (tensor(n, rows, inner), tensor(n, inner, columns), tensor(n, rows, columns))
        for n, rows, inner, columns in sizes
    ]

    def step():
        for a, b, ab in products:
            torch.bmm(a, b, out=ab)
            torch.bmm(ab, b.mT, out=a)
            torch.bmm(a.mT, ab, out=b)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def bench_step(_) -> None:
    """Tokens a second of forward, backward, clipping and AdamW."""
    names = ["models.py, compiled", "models.py", "models.py, logits kept, compiled", SHIPPED]
    names += [f"transformers' {name}" for name in ("LlamaForCausalLM", "LlamaForCausalLM, compiled", "GPT2LMHeadModel")]
    sequences, steps = int(os.environ.get("BENCH_SEQUENCES", 16)), {}
    for name in names:
        with contextlib.suppress(ImportError):
            changes = ["model.flash_attention=false"] if name == SHIPPED else []
            steps[name], *built = training_step(name, changes, sequences)
            if name == "models.py":
                steps["the step's matrix products alone"] = bare_products(*built, sequences)
    times = {name: [] for name in steps}
    for i in range(STEP_ROUNDS + 2):
        for name, step in steps.items():
            took = seconds(step)
            if i > 1:  # the first ones compile and fill the allocator
                times[name].append(took)
    medians = {name: statistics.median(t) for name, t in times.items()}
    c, first = built[-1], medians[names[0]]
    tokens = sequences * c.block_size
    rows = [(name, f"{tokens / t:,.0f} tok/s", f"{first / t:.2f}") for name, t in medians.items()]
    what = f"a step of {BENCH_CONFIG}, {sequences} sequences of {c.block_size}, {'bfloat16' if BF16 else 'float32'}"
    table(what, rows, STEP_ROUNDS)


def peak_of(name: str, changes: list[str], sequences: int) -> tuple[float, float]:
    """(peak memory of a step in MB, its seconds), in a process of its own."""
    step, *_ = training_step(name, changes, sequences)
    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use now
    took = min(seconds(step) for _ in range(2))
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6, took
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3, took


def bench_memory(_) -> None:
    """Peak memory of a step with a vocabulary of 50,277, all of the process (on a GPU: all that is allocated)."""
    sequences, changes = 8, ["model.vocab_size=50277"]
    names = ["models.py", "models.py, logits kept", "transformers' LlamaForCausalLM"]
    names += [names[0] + ", compiled", names[1] + ", compiled"]
    rows, first = [], None
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool, contextlib.suppress(ImportError):
            megabytes, took = pool.apply(peak_of, (name, changes, sequences))
            first = first or megabytes
            rows.append((name, f"{megabytes:,.0f} MB {took:6.2f} s", f"{megabytes / first:.2f}"))
    table(f"peak memory of a step of {BENCH_CONFIG}, {' '.join(changes)}, {sequences} sequences", rows, 1)


# -----------------------------------------------------------------------------
# train.py

LOOP_UPDATES = 60


def quickstart(folder: Path) -> list[str]:
    """Prepare the quick start's data in `folder`: the overrides that train on it, without evaluation or saving."""
    paths = [f"{split}_dataset_config.path={folder / 'data'}" for split in ("train", "val")]
    subprocess.run([sys.executable, ROOT / "prepare_data.py", QUICKSTART, *paths], check=True, capture_output=True)
    quiet = "val_loss_every=0", "sample_every=0", "resume_every=0", "intermediate_checkpoints=false", "compile=false"
    return [*paths, *quiet, "device=cpu", f"num_iterations={LOOP_UPDATES}"]


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
    return seen, metrics[-1]["tokens_per_s"]


def bare_rate(overrides: list[str]) -> float:
    """Tokens/s of the same updates on one batch that is there: forward, backward, clipping, AdamW, nothing else."""
    c = train.load_config(QUICKSTART, overrides)
    model = MODEL_CLASSES[c.model.model_type](c.model)
    optimizer = model.configure_optimizers(c.weight_decay, c.learning_rate, (0.9, 0.95), "cpu")
    idx = torch.randint(c.model.vocab_size, (c.batch_size, c.model.block_size + 1))
    for s in range(LOOP_UPDATES):
        if s == LOOP_UPDATES // 2:
            began = time.perf_counter()
        _, loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (LOOP_UPDATES - LOOP_UPDATES // 2) * c.batch_size * c.model.block_size / (time.perf_counter() - began)


def bench_loop(folder: Path) -> None:
    """train.py's own tokens/s against the bare step, with two ranks against two threads, and with checkpoints."""
    options = quickstart(folder)
    rates = {"bare": [], "loop": [], "ranks": []}
    checkpoint, plain = [], []
    for _ in range(ROUNDS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, as train.py has
            rates["bare"].append(pool.apply(bare_rate, (options,)))
        rates["loop"].append(trained(folder, [*options, f"train_log_every={LOOP_UPDATES // 2}"])[1])
        rates["ranks"].append(
            trained(folder, [*options, f"train_log_every={LOOP_UPDATES // 2}"], 2, OMP_NUM_THREADS="1")[1]
        )
        seen, _ = trained(folder, [*options, "train_log_every=1", "checkpoint_every=10", "keep_optimizer=true"])
        took = np.diff(seen)  # took[i] is update i + 2's, with the saving after update i + 1
        checkpoint += took[9 : LOOP_UPDATES - 2 : 10].tolist()
        plain += np.delete(took, slice(9, None, 10)).tolist()
    rate = {name: statistics.median(r) for name, r in rates.items()}
    threads = torch.get_num_threads()
    rows = [
        (f"the bare step, {threads} threads", f"{rate['bare']:,.0f} tok/s", "1.00"),
        (f"train.py, {threads} threads", f"{rate['loop']:,.0f} tok/s", f"{rate['loop'] / rate['bare']:.2f}"),
        ("train.py, 2 ranks of 1 thread", f"{rate['ranks']:,.0f} tok/s", f"{rate['ranks'] / rate['bare']:.2f}"),
        ("an update", f"{1000 * statistics.median(plain):.1f} ms", "1.00"),
        (
            "an update after which weights and optimizer are kept",
            f"{1000 * statistics.median(checkpoint):.1f} ms",
            f"{statistics.median(checkpoint) / statistics.median(plain):.2f}",
        ),
    ]
    table("the loop, on the quick start's model and data, float32, not compiled", rows)


def bench_start(folder: Path) -> None:
    """From the command to what it is good for: imports, the first update, the first compiled update twice."""
    options = [*quickstart(folder), "num_iterations=1", "warmup_iters=0"]

    def python(code: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT))

    def first_update(*more: str, **env) -> float:
        began = time.monotonic()
        return trained(folder, [*options, *more], **env)[0][0] - began

    times = {name: [] for name in ("torch", "models", "run_info", "update", "compiled", "compiled again")}
    for i in range(ROUNDS):
        for name in ("torch", "models", "run_info"):
            times[name].append(python(f"import {name}"))
        times["update"].append(first_update())
        cache = str(folder / f"cache{i}")
        for name in ("compiled", "compiled again"):
            times[name].append(first_update("compile=true", TORCHINDUCTOR_CACHE_DIR=cache))
    middle = {name: statistics.median(t) for name, t in times.items()}
    rows = [
        (f"import {name}", f"{middle[name]:.2f} s", f"{middle[name] / middle['torch']:.2f}")
        for name in ("torch", "models", "run_info")
    ]
    rows += [
        ("train.py to its first update", f"{middle['update']:.2f} s", ""),
        ("  more than importing torch", f"{middle['update'] - middle['torch']:.2f} s", ""),
        ("train.py to its first update, compiled, no cache", f"{middle['compiled']:.2f} s", "1.00"),
        (
            "the same again, from inductor's cache",
            f"{middle['compiled again']:.2f} s",
            f"{middle['compiled again'] / middle['compiled']:.2f}",
        ),
    ]
    table("the start", rows)


def bench_prepares(folder: Path) -> None:
    """bench_prepare with each of BENCH_TOKENIZERS."""
    for i, tokenizer in enumerate(os.environ.get("BENCH_TOKENIZERS", "gpt2").split(",")):
        (folder / str(i)).mkdir()
        bench_prepare(folder / str(i), tokenizer, os.cpu_count())


BENCHMARKS = {"step": bench_step, "memory": bench_memory, "loop": bench_loop}
BENCHMARKS |= {"loader": bench_loader, "prepare": bench_prepares, "start": bench_start}


def main() -> None:
    for name in sys.argv[1:] or BENCHMARKS:
        if name not in BENCHMARKS:
            sys.exit(f"bench: no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))


if __name__ == "__main__":
    main()
