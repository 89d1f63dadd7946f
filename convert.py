"""Write a run in the formats of others: Hugging Face's transformers, and param-decomp.

    python convert.py RUN --hf DIR
    python convert.py RUN --param-decomp DATA_ROOT --as PROJECT/RUN_ID

RUN is what run_info.py takes: a run folder, a checkpoint or a run on W&B. What the other side cannot express is refused
by name. `from_hugging_face` reads the other way: GPT2.from_pretrained("gpt2").
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

from prepare_data import UserError, tokenizer_config, validated, whole_file, write_text
from run_info import LISTING, PretrainRunInfo, in_short, read_json, wandb_run

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
QUERIES_KEYS = r"\.attn\.[qk]_proj\."
# Projections that are merged in some models -> their parts, of equal size, in order.
MERGED = {".c_attn.": (".q_proj.", ".k_proj.", ".v_proj."), ".kv_attn.": (".k_proj.", ".v_proj.")}


def canonical(model, head_size: int, adjacent: bool) -> dict:
    """{name in LlamaSimple's spelling: view of the values} of every parameter of a model, ours or Hugging Face's.

    Weights are (out, in). RoPE turns two dimensions of a head together: 2i and 2i + 1 if `adjacent`, or else i and
    i + head_size / 2, as everywhere at Hugging Face's.
    """
    views = {}
    for name, x in model.named_parameters():  # a tied weight once
        owner = model.get_submodule(name.rpartition(".")[0])
        if type(owner).__name__ == "Conv1D":  # a linear layer of Hugging Face's GPT-2, whose weight is (in, out)
            x = x.t()
        # A name that is not known here stays as it is, and so finds no partner in the other model.
        for pattern, spelling in SPELLINGS:
            name = re.sub(pattern, spelling, name)
        merged = next((part for part in MERGED if part in name), "")
        parts = MERGED.get(merged, [""])
        for part, view in zip(parts, x.chunk(len(parts)), strict=True):
            views[name.replace(merged, part)] = view
    for name, x in views.items():
        # The rows of q and k by head, pair and place within the pair: (nh, hs / 2, 2, ...).
        if re.search(QUERIES_KEYS, name):
            pairs = x.unflatten(0, (-1, head_size // 2, 2) if adjacent else (-1, 2, head_size // 2))
            views[name] = pairs if adjacent else pairs.transpose(1, 2)
    return views


def copy_parameters(ours, hf, to_hf: bool) -> None:
    """Copy every parameter of our model to Hugging Face's, or back. Raises UserError if one has no partner."""
    head_size = ours.config.n_embd // ours.config.n_head
    here = canonical(ours, head_size, getattr(ours.config, "rotary_adjacent_pairs", False))
    there = canonical(hf, head_size, False)
    alone = {(name, x.shape) for name, x in here.items()} ^ {(name, x.shape) for name, x in there.items()}
    if alone:
        names = f"{type(ours).__name__} and {type(hf).__name__}"
        raise UserError(f"{names} differ in parameters: {[name for name, _ in sorted(alone)[:8]]}")
    with torch.no_grad():
        for name, x in here.items():
            source, target = (x, there[name]) if to_hf else (there[name], x)
            target.copy_(source)


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


def hf_fields(c, name: str) -> dict:
    """Hugging Face's config for our model class `name` with the config `c`. Raises UserError if it has none."""
    if name not in HF_TYPES:
        raise UserError(f"Hugging Face's class for {name} is not known: add it to HF_TYPES in convert.py")
    fields = {theirs: getattr(c, ours) for ours, theirs in HF_NAMES.items() if hasattr(c, ours)}
    fields |= {"model_type": HF_TYPES[name], "tie_word_embeddings": True}
    if HF_TYPES[name] == "gpt2":
        fields |= {"n_inner": 4 * c.n_embd, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
        fields |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        return fields
    if not c.use_grouped_query_attention:  # a merged c_attn, which has as many key/value heads as query heads
        fields["num_key_value_heads"] = c.n_head
    fields["head_dim"] = c.n_embd // c.n_head
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rotary_base}
    fields["hidden_act"] = "gelu_pytorch_tanh" if HF_TYPES[name] == "arcee" else "silu"
    return fields


def from_hugging_face(cls, name: str):
    """A model of our class `cls`, in eval mode, with the weights of Hugging Face's `name`, a folder or a hub id.

    Raises UserError if it cannot be loaded, or does not compute exactly what `cls` does.
    """
    try:
        transformers = import_transformers()
        given = transformers.AutoConfig.from_pretrained(name)
    except (ImportError, OSError, ValueError) as e:  # OSError: no such model, no network; ValueError: not known
        raise UserError(f"{name} is no run, nor can Hugging Face load it: {in_short(e)}") from e
    model = cls(our_config(cls, given, name))
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    # transformers draws at random what a file lacks, and leaves out what it does not know.
    wrong = {*report["missing_keys"], *report["unexpected_keys"]}
    if wrong:
        raise UserError(f"{name} is no whole {given.model_type}: missing or unexpected are {sorted(wrong)[:8]}")
    copy_parameters(model, hf, to_hf=False)
    return model.eval()


def our_config(cls, given, name: str):
    """The config of our class `cls` for Hugging Face's config `given` of the model `name`. Raises UserError."""
    kind = HF_TYPES.get(cls.__name__)
    if given.model_type != kind:
        raise UserError(f"{name} is Hugging Face's {given.model_type}, but {cls.__name__} can only load a {kind}")
    known = cls.config_class.__dataclass_fields__
    fields = {ours: getattr(given, theirs) for ours, theirs in HF_NAMES.items() if ours in known}
    if kind == "gpt2":
        given.n_inner = given.n_inner or 4 * given.n_embd  # null is its default
    else:
        fields["n_ctx"] = fields["block_size"]
        fields["rotary_dim"] = fields["n_embd"] // fields["n_head"]
        fields["rotary_base"] = given.rope_parameters["rope_theta"]
    c = validated(cls.config_class, fields, f"{name}: ")
    # Whatever else changes what the model computes must have the value that we would write.
    wanted = hf_fields(c, cls.__name__) | {"sliding_window": None}
    for field, value in wanted.items():
        if getattr(given, field, value) != value:
            raise UserError(f"{name} has {field} {getattr(given, field)}; a {cls.__name__} can only have {value}")
    return c


def hf_model(info: PretrainRunInfo):
    """Hugging Face's model with the weights of the run. Raises UserError."""
    transformers = import_transformers()
    model = info.load_model()
    c, name = model.config, type(model).__name__
    fields = hf_fields(c, name)
    # no pad_token_id: Llama's embedding would not train the row of that token, and pad is EOS
    fields |= {"bos_token_id": info.eos_token_id, "eos_token_id": info.eos_token_id}
    config = transformers.AutoConfig.for_model(**fields)
    # For other readers: llama.cpp's converter, and transformers 4, which takes 10000 where rope_theta is missing.
    config.n_ctx = c.block_size
    if config.model_type == "gpt2":
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0  # our models have no dropout
    else:
        config.rope_theta = c.rotary_base
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    copy_parameters(model, hf, to_hf=True)

    # A fork of a model may compute something else with the same parameters.
    idx = torch.arange(min(c.block_size, c.vocab_size, 64))[None]  # (1, T)
    with torch.no_grad():
        here, there = model(idx)[0], hf(idx).logits  # (1, T, V)
    if not (here - there).abs().max() < 1e-3 * here.abs().max():
        raise UserError(f"{type(hf).__name__} does not compute what {name} does: the logits differ")
    return hf


def export_hf(info: PretrainRunInfo, folder: Path) -> None:
    """Write model and tokenizer to `folder` as Hugging Face's Auto classes load them, whole or not at all.

    Raises UserError if Hugging Face cannot express the model, or if there is something in `folder`.
    """
    folder = folder.expanduser().absolute()
    if folder.is_file() or any(folder.glob("*")):
        raise UserError(f"{folder} exists already: name a new folder, or an empty one")
    hf = hf_model(info)
    # Not the run's file itself: its tokenizer may add, pad or cut.
    spec = json.loads(info.encoder.json) | {"truncation": None, "padding": None, "post_processor": None}
    eos = info.encoder.eos_token
    settings = json.loads(tokenizer_config(eos, for_transformers=True))
    settings |= {"bos_token": eos, "model_max_length": hf.config.max_position_embeddings}
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The folder gets its place when all is in it.
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        part = Path(temporary, folder.name)
        hf.save_pretrained(part)
        # safetensors makes files that only their owner can read, also on a shared disk.
        for path in part.glob("*.safetensors"):
            path.chmod((part / "config.json").stat().st_mode)
        write_text(part / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
        write_text(part / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        check_tokenizer(part, spec, info.load_tokenizer())
        os.replace(part, folder)


def check_tokenizer(folder: Path, spec: dict, tok) -> None:
    """Raise UserError if transformers reads one of the special tokens in a text as training did not."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(folder)
    for token in spec["added_tokens"]:
        text = token["content"]
        if hf(text).input_ids != tok.encode(text).ids:
            raise UserError(f"Hugging Face would read {text!r} in a text as a special token; training did not")


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

    `name` is PROJECT/RUN_ID. Raises UserError for a model that param-decomp's LlamaSimpleMLP is not.
    """
    from safetensors.torch import save

    model = info.load_model()
    c = model.config
    for field, value in PARAM_DECOMP_FIELDS.items():
        if getattr(c, field) != value:
            raise UserError(f"param-decomp takes a model with {field} {value} only; here it is {getattr(c, field)}")
    # Their file holds the tied weight once, as the embedding.
    weights = {key: x.float().contiguous() for key, x in model.state_dict().items() if key != "lm_head.weight"}
    if unknown := [key for key in weights if not re.fullmatch(PARAM_DECOMP_WEIGHTS, key)]:
        raise UserError(f"param-decomp's LlamaSimpleMLP has no {', '.join(unknown[:4])}")
    data = save(weights)
    # The name is that of the run on W&B (of its copy, or of the one that logged there), or else made from the weights.
    id_file = info.folder / "wandb_run_id"
    run_id = id_file.read_text().strip() if id_file.exists() else f"t-{hashlib.sha256(data).hexdigest()[:8]}"
    own = f"local/{info.config_dict.get('wandb_project') or 'pretrain'}/{run_id}"
    run_path = f"local/{name}" if name else read_json(info.folder / LISTING, {"run": own})["run"]
    found = wandb_run(run_path)
    if not found:
        raise UserError(f"{run_path} is no name: use --as PROJECT/RUN_ID, where RUN_ID is 8 of a-z, 0-9 or t-0123abcd")
    step = int(info.checkpoint_path.stem.removeprefix("model_step_"))
    check = read_json(info.folder / "check.json", {})

    # Their loader takes the entry if it has a model_config.yaml and exactly one safetensors: the weights come last.
    folder = data_root.expanduser().absolute() / "pretrain_cache" / f"{found[1]}-{found[2]}"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("model_step_*.safetensors"), *folder.glob("check.json")):
        stale.unlink()
    shape = info.model_config_dict | {"model_type": c.model_type, "rotary_dim": c.n_embd // c.n_head}
    write_text(folder / "model_config.yaml", yaml.safe_dump(shape, sort_keys=False))
    # Its readers can compare, too, if it is of these weights, as load_model has done.
    if check.get("step") == step:
        write_text(folder / "check.json", json.dumps(check) + "\n")
    with whole_file(folder / f"model_step_{step}.safetensors") as f:
        f.write(data)
    return f"wrote {folder}\n{PARAM_DECOMP_TARGET}    run_path: {run_path}\n"


# -----------------------------------------------------------------------------
# the command line


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a run in the formats of others.")
    parser.add_argument("run", help="a run folder, a checkpoint or a W&B path")
    parser.add_argument("--step", type=int, help="the checkpoint after this many updates (default: the last)")
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--hf", type=Path, metavar="DIR", help="a folder that Hugging Face's transformers loads")
    to.add_argument("--param-decomp", type=Path, metavar="DATA_ROOT", help="an entry of DATA_ROOT/pretrain_cache/")
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
            print(export_param_decomp(info, args.param_decomp, args.name), end="")
    except ImportError as e:
        sys.exit(f"convert: {e}: pip install {e.name}")
    except (UserError, OSError) as e:
        sys.exit(f"convert: {e}")


if __name__ == "__main__":
    main()
