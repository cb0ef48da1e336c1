"""The plain way: the language model as transformers has it, its `generate`, our image towers. It shares the weights of the model it is made from."""

from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import CompileConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prismatic.models.llama import LlamaConfig
from prismatic.models.vla import VLA


def stock_llama(text: LlamaConfig) -> transformers.LlamaForCausalLM:
    """transformers' own model of these sizes. Build it on the meta device, give it weights, then call `make_frequencies`."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            vocab_size=text.vocab_size,
            rms_norm_eps=text.rms_norm_eps,
            max_position_embeddings=text.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        )
    )


def make_frequencies(llama: Any, device: torch.device) -> None:
    """Its rotary table is no weight, so it comes with none: made anew, off the meta device."""
    with device:
        llama.model.rotary_emb = LlamaRotaryEmbedding(llama.config)


class StockDecoder:
    """best: with a static cache and the compiled step, transformers' own fast way; otherwise a growing cache, each kernel started by itself.

    Greedy over the whole vocabulary. Full rows only.
    """

    def __init__(self, vla: VLA, *, best: bool) -> None:
        self.vla, self.best = vla, best
        with torch.device("meta"):
            llama = stock_llama(vla.config.text_config)
        llama.load_state_dict(vla.language_model.state_dict(), assign=True)
        device = vla.language_model.model.norm.weight.device
        make_frequencies(llama, device)
        self.llama = llama.eval().requires_grad_(False)
        self._options: dict = {}
        if best:
            compiled = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
            compiled._compile_all_devices = True  # type: ignore[attr-defined] # transformers leaves a CPU uncompiled otherwise
            self._options = {"cache_implementation": "static", "compile_config": compiled}

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, action_dim: int) -> torch.Tensor:
        """(B, T) prompts that end in the empty token → (B, action_dim) ids."""
        embeddings = self.vla.embed(input_ids, pixel_values)
        return self.llama.generate(  # type: ignore[attr-defined] # its stubs deny it
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device),
            max_new_tokens=action_dim,
            min_new_tokens=action_dim,
            do_sample=False,
            pad_token_id=self.vla.config.pad_token_id,
            **self._options,
        )
