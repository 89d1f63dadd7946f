"""Every YAML in configs/ is a run that can start; SPD's own YAML runs unchanged."""

import re
import warnings

import pytest
import torch
from helpers import ROOT

import train
from models import MODEL_CLASSES

CONFIGS = {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}
# Millions of parameters, the tied embedding once: the sum that a reader of the file would make.
SIZES = {"quickstart": 0.9, "ss_llama_simple_mlp-2L-128": 0.9, "ss_llama_simple_mlp-4L-192": 2.5, "gpt2": 124.4}
SIZES |= {"gpt2_simple-2L": 0.98, "pile_llama_simple_mlp-1L-128": 6.6, "pile_llama_simple_mlp-2L-768": 51, "llama": 110}
SIZES |= {"pile_llama_simple_mlp-2L-2048": 190, "pile_llama_simple_mlp-4L-768": 64}
SIZES |= {"pile_llama_simple_mlp-12L-768": 117, "owt_llama_simple_mlp-12L-768": 117}


def on_meta(c):
    with torch.device("meta"):
        return MODEL_CLASSES[c.model.model_type](c.model)


@pytest.mark.parametrize("name", SIZES)
def test_config(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a config of ours gives no reason for a warning
        c = train.load_config(CONFIGS[name])
    train_data, val_data = c.train_dataset_config, c.val_dataset_config
    assert train_data.n_ctx == val_data.n_ctx == c.model.block_size + 1
    assert (train_data.name, train_data.split) != (val_data.name, val_data.split)  # validation on other text
    assert sum(p.numel() for p in on_meta(c).parameters()) / 1e6 == pytest.approx(SIZES[name], rel=0.1)
    assert 0 <= c.warmup_iters < c.num_iterations
    assert CONFIGS[name].read_text().startswith("#")  # says what it is for
    if name == "quickstart":  # needs no network
        assert {train_data.name, val_data.name} == {"python-stdlib"}
        assert train_data.hf_tokenizer_path is c.wandb_project is None


def test_all_configs_are_tested_and_all_that_the_readme_names_are_here():
    named = set(re.findall(r"configs/([\w.-]+)\.yaml", (ROOT / "README.md").read_text())) - {"x"}
    assert named <= set(SIZES) == set(CONFIGS)


SPD = """\
{wandb_project: spd, dtype: bfloat16, batch_size: 1024, num_iterations: 100_000, warmup_iters: 600, learning_rate: 3e-4,
 learning_rate_decay_frac: 0.1, weight_decay: 0.1, grad_clip: 1.0, val_loss_every: 100, val_max_steps: 20,
 sample_every: 1000, intermediate_checkpoints: false,
 model: {model_type: LlamaSimpleMLP, block_size: 512, vocab_size: 50277, n_layer: 4, n_head: 6, n_embd: 768,
   n_intermediate: 3072, mlp_bias: false, attn_bias: false, rotary_adjacent_pairs: false, rotary_dim: 341,
   rotary_base: 10000, n_ctx: 512, n_key_value_heads: 6, use_grouped_query_attention: true, flash_attention: true},
 train_dataset_config: {name: monology/pile-uncopyrighted, is_tokenized: false, hf_tokenizer_path:
   EleutherAI/gpt-neox-20b, split: "train[:10000000]", streaming: true, n_ctx: 513, seed: 0, column_name: text},
 val_dataset_config: {name: monology/pile-uncopyrighted, is_tokenized: false, hf_tokenizer_path:
   EleutherAI/gpt-neox-20b, split: "train[-100000:]", streaming: true, n_ctx: 513, seed: 0, column_name: text}}
"""


def test_a_yaml_of_spd_runs_unchanged(tmp_path):
    (tmp_path / "spd.yaml").write_text(SPD)
    with pytest.warns(UserWarning, match="rotary_dim 341"):  # the one thing to say about it
        c = train.load_config(tmp_path / "spd.yaml")
    assert (c.wandb_project, c.dtype, c.intermediate_checkpoints) == ("spd", "bfloat16", False)
    assert (c.num_iterations, c.learning_rate, c.warmup_iters, c.model.rotary_dim) == (100_000, 3e-4, 600, 341)
    assert (c.train_dataset_config.streaming, c.train_dataset_config.split) == (True, "train[:10000000]")
    assert c.train_dataset_config.folder() == c.val_dataset_config.folder()
    assert on_meta(c).lm_head.weight.shape == (50277, 768)
