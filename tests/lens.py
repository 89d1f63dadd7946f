"""An exported folder as a transformer_lens.HookedTransformer (transformer-lens 3.x), weight for weight."""

import torch


def hooked(folder):
    """The HookedTransformer of a folder that run_info.py --export-hf wrote, with nothing folded or centred.

    HookedTransformer.from_pretrained takes the names of its own list alone, and a Llama's biases for zeros. Its gated
    MLP has no place for those of gate and up: permanent hooks add them, which reset_hooks(including_permanent=True)
    would take away.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder)
    c, layers, shared = hf.config, hf.model.layers if hf.config.model_type == "llama" else [], ""
    shape = {"n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads, "d_model": c.hidden_size}
    shape |= {"n_ctx": c.max_position_embeddings, "d_vocab": c.vocab_size, "d_head": c.hidden_size // shape["n_heads"]}
    if layers:
        shape |= {"d_mlp": c.intermediate_size, "act_fn": c.hidden_act, "gated_mlp": True, "eps": c.rms_norm_eps}
        shape |= {"normalization_type": "RMS", "final_rms": True, "positional_embedding_type": "rotary"}
        shape |= {"rotary_dim": shape["d_head"], "rotary_base": c.rope_parameters["rope_theta"]}
        if c.num_key_value_heads != c.num_attention_heads:
            shape["n_key_value_heads"], shared = c.num_key_value_heads, "_"  # its name for a grouped k: _W_K
    else:
        shape |= {"d_mlp": c.n_inner, "act_fn": c.activation_function, "eps": c.layer_norm_epsilon}
    cfg = HookedTransformerConfig(**shape, original_architecture=c.architectures[0], init_weights=False, device="cpu")
    model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder))
    state = get_pretrained_state_dict(str(folder), cfg, hf)
    for i, layer in enumerate(layers):
        attn, mlp, block = layer.self_attn, layer.mlp, model.blocks[i].mlp
        places = {"attn.b_Q": attn.q_proj, f"attn.{shared}b_K": attn.k_proj, f"attn.{shared}b_V": attn.v_proj}
        for place, linear in (places | {"attn.b_O": attn.o_proj, "mlp.b_out": mlp.down_proj}).items():
            if linear.bias is not None:
                state[f"blocks.{i}.{place}"] = linear.bias.view_as(state[f"blocks.{i}.{place}"])
        gates = ("b_gate", mlp.gate_proj, block.hook_pre), ("b_up", mlp.up_proj, block.hook_pre_linear)
        for name, linear, hook in gates:
            if linear.bias is not None:
                bias = torch.nn.Parameter(linear.bias.detach())
                block.register_parameter(name, bias)
                hook.add_perma_hook(lambda x, hook, bias=bias: x + bias)
    processing = "fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"
    model.load_and_process_state_dict(state, **dict.fromkeys(processing, False))
    return model.eval()
