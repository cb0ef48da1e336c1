#!/usr/bin/env bash
# How checkpoints/openvla-tiny was made: expert demonstrations of four libero_spatial tasks, then all of the small model from random weights.
# Training took 46 minutes on 2 shared CPU cores. The checkpoint that is here came from an earlier state of the expert and of the randomised
# resets (see the README): running this again makes another one. Ctrl-C and the same command go on from there.
set -euo pipefail
cd "$(dirname "$0")/.."
./setup.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2
python=.venv/bin/python work=workspace/openvla-tiny
[ -d $work/random ] || $python checkpoints/make_openvla_tiny.py $work/random
$python collect.py --task_suite_name libero_spatial --task_ids 1 2 3 8 --num_demos_per_task 40 --data_root_dir $work/datasets \
    --dataset_name libero_spatial_base --num_workers 2
$python finetune.py --vla_path $work/random --data_root_dir $work/datasets --dataset_name libero_spatial_base --use_lora False \
    --run_root_dir $work/runs --cache_dir $work/cache --batch_size 16 --learning_rate 1e-3 --lr_schedule cosine --warmup_steps 100 \
    --max_grad_norm 1.0 --max_steps 5000 --save_steps 500 --num_workers 1 --augment_order random_resized_crop
rm -rf $work/openvla-tiny
$python export.py --checkpoint "$(ls -td $work/runs/*/latest | head -n 1)" --output $work/openvla-tiny --dtype float32
rm -rf checkpoints/openvla-tiny && mv $work/openvla-tiny checkpoints/openvla-tiny
$python eval.py --pretrained_checkpoint checkpoints/openvla-tiny --task_ids 1 2 3 8 --num_trials_per_task 10
