"""OpenVLA's and OpenVLA-OFT's own command lines are taken."""

import pytest
import tyro

from config import FinetuneConfig
from prismatic.errors import ConfigError
from prismatic.foreign_flags import FINETUNE, translate

OPENVLA = (
    "--vla_path openvla/openvla-7b --data_root_dir D --dataset_name bridge_orig --run_root_dir R --adapter_tmp_dir T --lora_rank 32 --batch_size 16 "
    "--grad_accumulation_steps 1 --learning_rate 5e-4 --image_aug True --wandb_project P --wandb_entity E --save_steps 500"
)
OFT = (
    "--vla_path openvla/openvla-7b --data_root_dir D --dataset_name libero_spatial_no_noops --run_root_dir R --use_l1_regression True "
    "--use_diffusion False --use_film False --num_images_in_input 2 --use_proprio True --batch_size 8 --learning_rate 5e-4 "
    "--num_steps_before_decay 100000 --max_steps 150005 --save_freq 10000 --save_latest_checkpoint_only False --image_aug True --lora_rank 32 "
    "--wandb_entity E --wandb_project P --run_id_note note"
)


def parsed(line: str) -> FinetuneConfig:
    how = (tyro.conf.FlagConversionOff,)
    return tyro.cli(FinetuneConfig, args=translate(line.split(), FINETUNE), config=how, use_underscores=True)


def test_openvla_s_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = parsed(OPENVLA)
    assert (cfg.save_steps, cfg.wandb_project, cfg.batch_size) == (500, "P", 16)
    said = capsys.readouterr().out
    assert said.count("notice: --adapter_tmp_dir T has no effect") == 1 == said.count("\n")


def test_openvla_oft_s_command_line() -> None:
    cfg = parsed(OFT)
    assert (cfg.action_head, cfg.num_images_in_input, cfg.use_proprio, cfg.lr_decay_step) == ("l1", 2, True, 100_000)
    assert cfg.save_steps == 10_000 and cfg.keep > 15
    assert parsed("--use_l1_regression=False").action_head == "parallel"
    warm = parsed("--lr-warmup-steps 5 --resume True --save_latest_checkpoint_only true --use_wandb True")
    assert (warm.warmup_steps, warm.warmup_start, warm.resume, warm.keep, warm.log_to) == (5, 0.1, "auto", 1, "wandb")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("--use_film True", "--use_film True is not built"), ("--use_wandb 3", "True or False"), ("--save_freq", "value")],
)
def test_what_is_not_built_is_one_sentence(line: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        translate(line.split(), FINETUNE)


def test_our_own_flags_pass() -> None:
    assert translate(["--cuda_graph", "True"], FINETUNE) == []  # it was ours once
    assert translate(["--batch_size=4", "--keep", "3"], FINETUNE) == ["--batch_size=4", "--keep", "3"]
