"""The plain way: the language model as transformers has it, its `generate`, our image towers. It shares the weights of the model it is made from."""

import dataclasses

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import CompileConfig

from prismatic.models.vla import VLA


class StockDecoder:
    """best: with a static cache and the compiled step, transformers' own fast way; otherwise a growing cache, each kernel started by itself.

    Greedy over the whole vocabulary. Full rows only.
    """

    def __init__(self, vla: VLA, *, best: bool) -> None:
        self.vla, self.best = vla, best
        text = dataclasses.asdict(vla.config.text_config)
        with torch.device("meta"):
            llama = LlamaForCausalLM(LlamaConfig(**text, tie_word_embeddings=False))
        llama.load_state_dict(vla.language_model.state_dict(), assign=True)
        device = vla.language_model.model.norm.weight.device
        # its frequencies are no weights: made anew, off the meta device
        llama.model.rotary_emb = type(llama.model.rotary_emb)(llama.config).to(device)
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
