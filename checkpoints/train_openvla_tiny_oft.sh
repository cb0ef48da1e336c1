#!/usr/bin/env bash
# How checkpoints/openvla-tiny-oft was made, from nothing: expert demonstrations of nine libero_spatial tasks (task 0 is left for the demo), then
# all of the small model from random weights with OpenVLA-OFT's L1 head, chunks of 8, two cameras and the robot's state. How long it
# took stands in the model card. Ctrl-C and the same command go on from there.
set -euo pipefail
cd "$(dirname "$0")/.."
./setup.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # two processes on the CPU, also where there is a GPU
python=.venv/bin/python work=${WORKSPACE:-workspace}/openvla-tiny-oft name=libero_spatial_base
[ -d $work/random ] || $python checkpoints/make_openvla_tiny.py $work/random

$python collect.py --task_suite_name libero_spatial --task_ids 1 2 3 4 5 6 7 8 9 --num_demos_per_task 50 --num_workers 2 \
    --data_root_dir $work/datasets --dataset_name $name
# bfloat16 wants a CPU with instructions for it: where yours has none leave --autocast out, and other weights come out
$python -m torch.distributed.run --standalone --nproc-per-node 2 finetune.py --vla_path $work/random --use_lora False \
    --action_head l1 --num_images_in_input 2 --use_proprio True --data_root_dir $work/datasets --dataset_name $name \
    --run_root_dir $work/runs --cache_dir $work/cache --batch_size 8 --autocast bfloat16 --learning_rate 1e-3 --lr_schedule cosine \
    --warmup_steps 100 --max_grad_norm 1.0 --max_steps 4000 --save_steps 1000 --num_workers 1 --augment_order random_resized_crop
rm -rf $work/exported
$python export.py --checkpoint $work/runs/*/latest --output $work/exported --dtype float32
checkpoints/install.sh $work/exported checkpoints/openvla-tiny-oft
$python eval.py --pretrained_checkpoint checkpoints/openvla-tiny-oft --task_ids 1 2 3 4 5 6 7 8 9 --num_trials_per_task 20 --render_quality fast
