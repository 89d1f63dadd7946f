"""Write a run in the formats of others: Hugging Face's transformers, and param-decomp.

    python convert.py RUN --hf DIR
    python convert.py RUN --param-decomp DATA_ROOT --as PROJECT/RUN_ID

RUN is a run folder, a checkpoint or a run on W&B. What the other side cannot express is refused by name.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from models import compare_with_check, untied_weights
from prepare_data import TEXT_ONLY, UserError, check_same, local, tokenizer_config, validated, whole_file, write_text
from run_info import LISTING, PretrainRunInfo, blame, read_json, wandb_run, write_json

# -----------------------------------------------------------------------------
# one spelling of all models' parameters

# Ours and Hugging Face's names -> those of LlamaSimple. Applied in this order, anywhere in a parameter's name.
SPELLINGS = (
    (r"^(transformer|model)\.", ""),
    (r"^(h_torch|layers)\.", "h."),
    (r"^embed_tokens\.", "wte."),
    (r"^(rms_f|norm)\.", "ln_f."),
    (r"\.(ln_1|input_layernorm)\.", ".rms_1."),
    (r"\.(ln_2|post_attention_layernorm)\.", ".rms_2."),
    (r"\.self_attn\.", ".attn."),
    (r"\.attn\.c_proj\.", ".attn.o_proj."),
    (r"\.attn\.q_attn\.", ".attn.q_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
)
# Projections that are merged in some models -> their parts, of equal size, in order.
MERGED = {".c_attn.": (".q_proj.", ".k_proj.", ".v_proj."), ".kv_attn.": (".k_proj.", ".v_proj.")}


def canonical(model) -> dict:
    """{(name in LlamaSimple's spelling, shape): values, (out, in)} of every parameter, ours or Hugging Face's.

    They are views, except for copies of q and k with adjacent pairs: only models without such pairs are written to.
    """
    c = model.config
    values = {}
    for name, x in model.named_parameters():  # a tied weight once
        if c.model_type == "gpt2" and ".c_" in name:  # Hugging Face's Conv1D, whose weight is (in, out)
            x = x.t()
        # A name that is not known here stays as it is, and so finds no partner in the other model.
        for pattern, spelling in SPELLINGS:
            name = re.sub(pattern, spelling, name)
        keys = [name]
        for merged, parts in MERGED.items():
            if merged in name:
                keys = [name.replace(merged, part) for part in parts]
        for key, rows in zip(keys, x.chunk(len(keys)), strict=True):
            # RoPE turns two rows of a head together: 2i and 2i + 1 if adjacent, or else, as everywhere at Hugging
            # Face's, i and i + half.
            if getattr(c, "rotary_adjacent_pairs", False) and re.search(r"\.[qk]_proj\.", key):
                half = c.n_embd // c.n_head // 2
                rows = rows.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
            values[key, rows.shape] = rows
    return values


@torch.no_grad()
def copy_parameters(source, target):
    """Copy every parameter of `source` to `target`: one is our model, the other Hugging Face's.

    Raises UserError if a parameter of either has no partner of its name and shape.
    """
    here = canonical(source)
    there = canonical(target)
    if alone := here.keys() ^ there.keys():
        raise UserError(f"{type(source).__name__} and {type(target).__name__} differ in {sorted(alone)[:8]}")
    for key, x in there.items():
        x.copy_(here[key])


# -----------------------------------------------------------------------------
# Hugging Face: both GPT-2s are its gpt2, Llama and LlamaSimple its llama, LlamaSimpleMLP its arcee

HF_TYPES = {"GPT2": "gpt2", "GPT2Simple": "gpt2", "Llama": "llama", "LlamaSimple": "llama", "LlamaSimpleMLP": "arcee"}
HF_NAMES = {  # our field -> Hugging Face's; its gpt2 knows them under these names, too
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_intermediate": "intermediate_size",
    "n_key_value_heads": "num_key_value_heads",
    "attn_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "rms_norm_eps": "rms_norm_eps",
}


def import_transformers():
    """The transformers library. Raises UserError below version 5, which has no rope_parameters."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UserError(f"this takes transformers 5 or later, and {transformers.__version__} is installed")
    return transformers


def hf_fields(cls, c) -> dict:
    """Hugging Face's config for our model class `cls` with the config `c`. Raises UserError if it has none."""
    kind = HF_TYPES.get(cls.__name__)
    if not kind:
        raise UserError(f"Hugging Face's class for {cls.__name__} is not known: add it to HF_TYPES in convert.py")
    fields = {theirs: getattr(c, ours) for ours, theirs in HF_NAMES.items() if hasattr(c, ours)}
    fields |= {"model_type": kind, "tie_word_embeddings": True, "n_ctx": c.block_size}  # llama.cpp reads n_ctx
    if kind == "gpt2":
        return fields | {
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        }
    # A merged c_attn has as many key/value heads as query heads.
    if not c.use_grouped_query_attention:
        fields["num_key_value_heads"] = c.n_head
    return fields | {
        "head_dim": c.n_embd // c.n_head,
        "hidden_act": "gelu_pytorch_tanh" if kind == "arcee" else "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rotary_base},
    }


def from_hugging_face(cls, name: str):
    """What cls.from_pretrained(name) returns for a model of Hugging Face's, in a folder or at a hub id; in eval mode.

    Raises UserError if it cannot be loaded, or does not compute exactly what `cls` does.
    """
    with blame(f"{name} is no run, nor can Hugging Face load it"):
        transformers = import_transformers()
        given = transformers.AutoConfig.from_pretrained(name)
    model = cls(our_config(cls, given, name))
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    # transformers draws at random what a file lacks, and leaves out what it does not know.
    if wrong := {*report["missing_keys"], *report["unexpected_keys"]}:
        raise UserError(f"{name} has missing or unexpected weights: {sorted(wrong)[:8]}")
    copy_parameters(hf, model)
    return model.eval()


def our_config(cls, given, name: str):
    """The config of our class `cls` for Hugging Face's config `given` of the model `name`. Raises UserError."""
    if given.model_type != HF_TYPES.get(cls.__name__):
        raise UserError(f"{name} is Hugging Face's {given.model_type}, which is not a {cls.__name__}")
    fields = {ours: getattr(given, theirs) for ours, theirs in HF_NAMES.items() if hasattr(given, theirs)}
    if given.model_type != "gpt2":
        fields |= {
            "rotary_dim": given.head_dim,
            "rotary_base": given.rope_parameters["rope_theta"],
            "n_ctx": given.max_position_embeddings,
        }
    c = validated(cls.config_class, fields, f"{name}: ")
    # Whatever else changes what the model computes must have the value that we would write.
    wanted = hf_fields(cls, c) | {"sliding_window": None}
    there = {field: getattr(given, field, value) for field, value in wanted.items()}
    check_same(there, wanted, f"{name} does not compute what a {cls.__name__} does")
    return c


def hf_model(info: PretrainRunInfo):
    """Hugging Face's model with the weights of the run. Raises UserError."""
    transformers = import_transformers()
    model = info.load_model()
    c = model.config
    eos = info.eos_token_id
    # no pad_token_id: Llama's embedding would not train the row of that token, and pad is EOS
    config = transformers.AutoConfig.for_model(**hf_fields(type(model), c), bos_token_id=eos, eos_token_id=eos)
    if config.model_type == "gpt2":
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0  # our models have no dropout
    else:
        config.rope_theta = c.rotary_base  # for transformers 4, which takes 10000 where it is missing
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    copy_parameters(model, hf)

    # A fork of a model may compute something else with the same parameters.
    idx = torch.arange(c.block_size)[None] % c.vocab_size  # (1, T)
    idx[:, ::8] = eos  # a mask between documents would show
    with torch.no_grad():
        here, there = model(idx)[0], hf(idx).logits  # (1, T, V)
    if not (here - there).abs().max() < 1e-3 * here.abs().max():
        raise UserError(f"{type(hf).__name__} does not compute what {type(model).__name__} does: the logits differ")
    return hf


def export_hf(info: PretrainRunInfo, folder: Path):
    """Write model and tokenizer to `folder` as Hugging Face's Auto classes load them, whole or not at all.

    Raises UserError if Hugging Face cannot express the model, or if there is something in `folder`.
    """
    if folder.is_file() or any(folder.glob("*")):
        raise UserError(f"{folder} exists already: name a new folder, or an empty one")
    hf = hf_model(info)
    encoder = info.encoder
    # Not the run's file itself: its tokenizer may add, pad or cut.
    spec = json.loads(encoder.json) | TEXT_ONLY
    settings = tokenizer_config(
        encoder.eos_token,
        split_special_tokens=True,
        bos_token=encoder.eos_token,
        model_max_length=hf.config.max_position_embeddings,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The folder gets its place when all is in it.
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        part = Path(temporary, folder.name)
        hf.save_pretrained(part)
        # safetensors makes files that only their owner can read, also on a shared disk.
        for path in part.glob("*.safetensors"):
            path.chmod((part / "config.json").stat().st_mode)
        write_json(part / "tokenizer.json", spec)
        write_text(part / "tokenizer_config.json", settings)
        # Text that looks like a special token must have the ids of training.
        theirs = import_transformers().AutoTokenizer.from_pretrained(part)
        for text in theirs.get_added_vocab():
            if theirs(text).input_ids != info.load_tokenizer().encode(text).ids:
                raise UserError(f"Hugging Face would take {text!r} in a text as a special token; training did not")
        os.replace(part, folder)


# -----------------------------------------------------------------------------
# param-decomp: an entry of its pretrain_cache/

# What its only loader, of a class that is called LlamaSimpleMLP too, takes for granted.
PARAM_DECOMP_FIELDS = {
    "model_type": "LlamaSimpleMLP",
    "use_grouped_query_attention": True,
    "rotary_adjacent_pairs": False,
    "attn_bias": False,
    "mlp_bias": False,
}
PARAM_DECOMP_TARGET = """\
target:
  spec:
    kind: pretrained
    model_class: param_decomp_lab.experiments.lm.pretrain.models.llama_simple_mlp.LlamaSimpleMLP
"""
PARAM_DECOMP_WEIGHTS = r"(wte|ln_f|h\.\d+\.(rms_[12]|attn\.[qkvo]_proj|mlp\.(c_fc|down_proj)))\.weight"


def export_param_decomp(info: PretrainRunInfo, data_root: Path, name: str | None) -> str:
    """Write the run as an entry of param-decomp's pretrain_cache/; returns the YAML lines that name it there.

    `name` is PROJECT/RUN_ID; None: that of the run on W&B, or else an id made of the weights. Raises UserError for a
    model that param-decomp's LlamaSimpleMLP is not.
    """
    from safetensors.torch import save

    model = info.load_model()
    c = model.config
    check_same(vars(c) | PARAM_DECOMP_FIELDS, vars(c), "param-decomp's LlamaSimpleMLP is another model")
    check = compare_with_check(model, info.checkpoint_path)  # as load_model has done
    weights = untied_weights(model)
    if unknown := [key for key in weights if not re.fullmatch(PARAM_DECOMP_WEIGHTS, key)]:
        raise UserError(f"param-decomp's LlamaSimpleMLP has no {unknown}")
    data = save(weights)
    # The run may have logged to W&B, or be a copy from there.
    id_file = info.folder / "wandb_run_id"
    run_id = id_file.read_text() if id_file.exists() else f"t-{hashlib.sha256(data).hexdigest()[:8]}"
    own = f"local/{info.config_dict.get('wandb_project') or 'pretrain'}/{run_id}"
    run_path = f"local/{name}" if name else read_json(info.folder / LISTING, {"run": own})["run"]
    found = wandb_run(run_path)
    if not found:
        raise UserError(f"{run_path} is not a valid name: use --as PROJECT/RUN_ID, with an id such as t-0123abcd")

    # Their loader takes the entry if it has a model_config.yaml and exactly one safetensors: the weights come last.
    folder = data_root.absolute() / "pretrain_cache" / "-".join(found[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("model_step_*.safetensors"), *folder.glob("check.json")):
        stale.unlink()
    shape = vars(c) | {"rotary_dim": c.n_embd // c.n_head}
    write_text(folder / "model_config.yaml", yaml.safe_dump(shape, sort_keys=False))
    if check:  # its readers can compare, too
        write_json(folder / "check.json", check)
    with whole_file(folder / f"{info.checkpoint_path.stem}.safetensors") as f:
        f.write(data)
    return f"wrote {folder}\n{PARAM_DECOMP_TARGET}    run_path: {run_path}"


# -----------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(description="Write a run in the formats of others.")
    parser.add_argument("run", help="a run folder, a checkpoint or a W&B path")
    parser.add_argument("--step", type=int, help="the checkpoint after this many updates (default: the last)")
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--hf", type=local, metavar="DIR", help="a folder that Hugging Face's transformers loads")
    to.add_argument("--param-decomp", type=local, metavar="DATA_ROOT", help="an entry of DATA_ROOT/pretrain_cache/")
    parser.add_argument("--as", dest="name", metavar="PROJECT/RUN_ID", help="the entry's name (default: the W&B run's)")
    args = parser.parse_args()
    if args.name and not args.param_decomp:
        parser.error("--as goes with --param-decomp")
    try:
        info = PretrainRunInfo.from_path(args.run, args.step)
        if args.hf:
            export_hf(info, args.hf)
            print(f"wrote {args.hf}")
        else:
            print(export_param_decomp(info, args.param_decomp, args.name))
    except (UserError, OSError, ImportError) as e:
        sys.exit(f"convert: {e}")


if __name__ == "__main__":
    main()
