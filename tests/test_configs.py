"""Every YAML in configs/ is a run that can start; SPD's own YAML runs unchanged."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import torch

import train
from models import MODEL_CLASSES

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# parameters in millions, the tied embedding once: the sum that a reader of the file would make
SIZES = {
    "quickstart": 0.9,
    "ss_llama_simple_mlp-2L-128": 0.9,
    "ss_llama_simple_mlp-4L-192": 2.5,
    "gpt2_simple-2L": None,
    "pile_llama_simple_mlp-1L-128": 6.6,
    "pile_llama_simple_mlp-2L-768": 51,
    "pile_llama_simple_mlp-2L-2048": 190,
    "pile_llama_simple_mlp-4L-768": 64,
    "pile_llama_simple_mlp-12L-768": 117,
    "owt_llama_simple_mlp-12L-768": 117,
    "gpt2": 124.4,
    "llama": 110,
}


def load(path, overrides=()):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a config of ours gives no reason for a warning
        return train.load_config(path, overrides)


def on_meta(c):
    with torch.device("meta"):
        return MODEL_CLASSES[c.model.model_type](c.model)


def test_all_that_the_readme_names_are_here():
    assert set(SIZES) <= {p.stem for p in CONFIGS}
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"configs/[\w.-]+\.yaml", readme):
        if path != "configs/x.yaml":
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config(path):
    c = load(path)
    model, text = on_meta(c), path.read_text()
    assert c.train_dataset_config.n_ctx == c.val_dataset_config.n_ctx == c.model.block_size + 1
    n_params = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.h.parameters())
    C, V, L = c.model.n_embd, c.model.vocab_size, c.model.n_layer
    wide = c.model.n_intermediate if hasattr(c.model, "n_intermediate") else 4 * C
    assert V * C < n_params <= V * C + blocks + c.model.block_size * C + 2 * C  # nothing counted twice
    assert L * (2 * C * C + 2 * C * wide) <= blocks <= L * (4 * C * C + 3 * C * wide + 13 * C + wide)
    if SIZES.get(path.stem):
        assert n_params / 1e6 == pytest.approx(SIZES[path.stem], rel=0.1)
    if depth := re.search(r"(\d+)L", path.stem):
        assert int(depth[1]) == L
    if width := re.search(r"L-(\d+)", path.stem):
        assert int(width[1]) == C
    family = {"llama_simple_mlp": "LlamaSimpleMLP", "gpt2_simple": "GPT2Simple", "gpt2": "GPT2", "llama": "Llama"}
    named = next((kind for name, kind in family.items() if name in path.stem), c.model.model_type)
    assert c.model.model_type == named
    # a rank's batch is split into whole micro-batches, on one GPU as on four
    for ranks in (1, 2, 4):
        assert c.batch_size % (ranks * (c.micro_batch_size or 1)) == 0
    assert 0 <= c.warmup_iters < c.num_iterations
    train_data, val_data = c.train_dataset_config, c.val_dataset_config
    assert (train_data.name, train_data.split) != (
        val_data.name,
        val_data.split,
    )  # validation on other text
    assert text.startswith("#")  # says what it is for


def test_quickstart_reads_no_network():
    c = load(ROOT / "configs" / "quickstart.yaml")
    assert {c.train_dataset_config.name, c.val_dataset_config.name} == {"python-stdlib"}
    assert c.train_dataset_config.hf_tokenizer_path is None
    assert c.wandb_project is None


SPD = """\
wandb_project: spd
dtype: bfloat16
batch_size: 1024
num_iterations: 100_000
warmup_iters: 600
learning_rate: 3e-4
learning_rate_decay_frac: 0.1
weight_decay: 0.1
grad_clip: 1.0
val_loss_every: 100
val_max_steps: 20
sample_every: 1000
intermediate_checkpoints: false
model:
  model_type: LlamaSimpleMLP
  block_size: 512
  vocab_size: 50277
  n_layer: 4
  n_head: 6
  n_embd: 768
  n_intermediate: 3072
  mlp_bias: false
  attn_bias: false
  rotary_adjacent_pairs: false
  rotary_dim: 341
  rotary_base: 10000
  n_ctx: 512
  n_key_value_heads: 6
  use_grouped_query_attention: true
  flash_attention: true
train_dataset_config:
  name: monology/pile-uncopyrighted
  is_tokenized: false
  hf_tokenizer_path: EleutherAI/gpt-neox-20b
  split: train[:10000000]
  streaming: true
  n_ctx: 513
  seed: 0
  column_name: text
val_dataset_config:
  name: monology/pile-uncopyrighted
  is_tokenized: false
  hf_tokenizer_path: EleutherAI/gpt-neox-20b
  split: train[-100000:]
  streaming: true
  n_ctx: 513
  seed: 0
  column_name: text
"""


def test_a_yaml_of_spd_runs_unchanged(tmp_path):
    (tmp_path / "spd.yaml").write_text(SPD)
    with pytest.warns(UserWarning, match="rotary_dim 341"):  # the one thing to say about it
        c = train.load_config(tmp_path / "spd.yaml")
    assert (c.wandb_project, c.dtype, c.intermediate_checkpoints) == ("spd", "bfloat16", False)
    assert (c.num_iterations, c.learning_rate, c.warmup_iters) == (100_000, 3e-4, 600)
    assert dataclasses.asdict(c.model)["rotary_dim"] == 341
    assert (c.train_dataset_config.streaming, c.train_dataset_config.split) == (True, "train[:10000000]")
    assert c.train_dataset_config.folder() == c.val_dataset_config.folder()
    assert on_meta(c).lm_head.weight.shape == (50277, 768)
