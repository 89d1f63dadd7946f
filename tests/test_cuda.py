"""train.py on a GPU, against float32 on a CPU; TEST_DEVICE=cpu runs what a CPU can do of this. See tests/gpu.sh."""

import os

import pytest
import torch
from bench import random_shards
from helpers import ROOT

import train
from models import load_file
from run_info import read_metrics

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
# what a run sets -> how far its losses, which fall from 8.34 to 7.95 or less, may be from those on a CPU
RUNS = {
    "dtype=float32 tensorcores=false": 1e-3,
    "dtype=float32 tensorcores=true": 0.01,
    "dtype=bfloat16": 0.01,
    "dtype=bfloat16 model.flash_attention=false micro_batch_size=2": 0.01,
    "dtype=bfloat16 compile=true": 0.01,
    "dtype=float16 micro_batch_size=2": 0.01,
    "dtype=bfloat16 optimizer=muon": 0.01,
}


@pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("choice", RUNS)
def test_losses_are_those_of_a_cpu_also_after_an_interruption(choice, tmp_path, capsys):
    if DEVICE == "cpu" and ("dtype=float16" in choice or "compile" in choice):
        pytest.skip("float16 needs CUDA, and compiling takes long on a CPU")
    options = random_shards(tmp_path, 4091)  # no multiple of 64: CUDA pads the vocabulary
    options += ["model.vocab_size=4091", "batch_size=4", "num_iterations=12", "warmup_iters=0", "learning_rate=1e-3"]
    options += ["compile=false", "checkpoint_every=6", "keep_optimizer=true"]

    def trained(folder, *choices):
        """Train, or resume an interrupted run: the losses of all updates, and the scaler's last state."""
        choices = *options, *choices, f"run_dir={folder}"
        assert train.main(str(ROOT / "configs" / "quickstart.yaml"), choices) == 0
        torch.set_float32_matmul_precision("highest")  # for the tests after this one
        losses = [line["train_loss"] for line in read_metrics(folder / "metrics.jsonl")]
        return torch.tensor(losses), load_file(folder / "checkpoints" / "optim_step_12.pt")["scaler"]

    torch._dynamo.utils.counters.clear()
    losses, scaler = trained(tmp_path / "run", f"device={DEVICE}", *choice.split())
    # train.py suppresses what the compiler raises, and runs eagerly: here that counts as a failure.
    assert (torch._dynamo.utils.counters["frames"]["ok"] > 0) == ("compile=true" in choice)
    optimizer = [c for c in choice.split() if c.startswith("optimizer")]
    on_cpu, _ = trained(tmp_path / "cpu", "device=cpu", "dtype=float32", *optimizer)
    torch.testing.assert_close(losses, on_cpu, rtol=0, atol=RUNS[choice])

    for path in (tmp_path / "run" / "checkpoints").glob("*_12.pt"):
        path.unlink()
    (tmp_path / "run" / "status").write_text("interrupted\n")
    resumed, last = trained(tmp_path / "run", f"device={DEVICE}", *choice.split())
    assert "after update 6" in capsys.readouterr().out
    torch.testing.assert_close(resumed, losses, rtol=0, atol=RUNS[choice] / 10)
    assert last == scaler
