"""Parameters that the published checkpoint has and that no output depends on: DDP must not wait for their gradients."""

from prismatic.models.vla import VLA

READ = ("patch_embed.", "pos_embed", "cls_token", "reg_token", "blocks.")  # what patch_features reads of a tower


def unused_parameters(vla: VLA) -> list[str]:
    """Names of the parameters that never get a gradient: of each tower the last block, its final norm and its pooling; lm_head beside a head."""
    unused = []
    for tower in ("featurizer", "fused_featurizer"):
        module = getattr(vla.vision_backbone, tower)
        names, last = [name for name, _ in module.named_parameters()], f"blocks.{len(module.blocks) - 1}."
        unused += [f"vision_backbone.{tower}.{n}" for n in names if not n.startswith(READ) or n.startswith(last)]
    if vla.action_head is not None:
        unused += [f"language_model.lm_head.{name}" for name, _ in vla.language_model.lm_head.named_parameters()]
    return unused
