"""The smallest member of the family: the same classes as openvla-7b, 2.1 M parameters, with a tokenizer of its own. What the demo runs on.

In: sentences that its words are taken from. Out: a VLAConfig, a tokenizer, random weights from a seed.
"""

from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prismatic.models.llama import LlamaConfig
from prismatic.models.vision import DINO_ID, SIGLIP_ID
from prismatic.models.vla import VLA, VLAConfig
from prismatic.processor import PROMPT

WORDS = 768  # ids of text, the special ones included; the 256 actions come behind them
ACTIONS, FILLING = 256, 64
SPECIAL = ("<unk>", "<s>", "</s>", "▁")  # ids 0 … 3, as in Llama-2 but for "▁", the empty token
EMPTY_ID = SPECIAL.index("▁")

TINY = VLAConfig(
    image_size=128,
    num_images_in_input=2,
    tiny_timm_kwargs={
        name: {"embed_dim": 96, "depth": 3, "num_heads": 3, "patch_size": 16, "mlp_ratio": 3} for name in (DINO_ID, SIGLIP_ID)
    },
    vision_stem=(16, 32, 64),
    text_config=LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=WORDS + ACTIONS + FILLING,
    ),
    pad_to_multiple_of=FILLING,
    pad_token_id=WORDS + ACTIONS,
    empty_token_id=EMPTY_ID,
)  # fmt: skip


def tiny_tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the prompt with each sentence in it (any other text works too); the last 256 words are the actions."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((PROMPT.format(instruction=sentence.lower()) for sentence in sentences), trainer)
    tokenizer.add_tokens([f"<unused_{i}>" for i in range(WORDS - tokenizer.get_vocab_size())])
    tokenizer.add_tokens([AddedToken(f"<action_{i}>", normalized=False) for i in range(ACTIONS)])
    tokenizer.add_special_tokens(["<PAD>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<PAD>"
    )


def random_vla(config: VLAConfig, *, seed: int) -> VLA:
    """A model to train from scratch: the decoder's matrices ~ N(0, 1 / inputs) (the usual 0.02 is for widths of thousands),
    LayerScale 1 (at timm's 1e-5 a small tower learns nothing).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vla = VLA(config)
        for name, parameter in vla.language_model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        for name, parameter in vla.vision_backbone.named_parameters():
            if name.endswith("scale_factor"):
                torch.nn.init.ones_(parameter)
    return vla
