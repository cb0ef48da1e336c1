#!/usr/bin/env bash
# How checkpoints/openvla-tiny-oft was made, from nothing: all of the small model from random weights with OpenVLA-OFT's L1 head, chunks of 8, two
# cameras and the robot's state, on the scripted expert's demonstrations of nine libero_spatial tasks (task 0 is left for the demo). First on
# demonstrations that are pushed and held back, which show the way back from a mistake; then on undisturbed ones, whose chunks are what was really
# done next. How long it took stands in the model card. Ctrl-C and the same command go on from there.
set -euo pipefail
cd "$(dirname "$0")/.."
./setup.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # two processes on the CPU, also where there is a GPU
python=.venv/bin/python work=${WORKSPACE:-workspace}/openvla-tiny-oft
[ -d $work/random ] || $python checkpoints/make_openvla_tiny.py $work/random

collect() { # collect DATASET OPTION …
    $python collect.py --task_suite_name libero_spatial --task_ids 1 2 3 4 5 6 7 8 9 --num_workers 2 --data_root_dir $work/datasets \
        --dataset_name "$@"
}

train() { # train NAME BASE OPTION …: then $work/NAME is a checkpoint folder of what was learnt
    local name=$1 base=$2
    shift 2
    [ -d "$work/$name" ] && return
    # bfloat16 wants a CPU with instructions for it: where yours has none leave --autocast out, and other weights come out
    $python -m torch.distributed.run --standalone --nproc-per-node 2 finetune.py --vla_path "$base" --use_lora False --data_root_dir $work/datasets \
        --run_root_dir "$work/runs-$name" --cache_dir $work/cache --batch_size 8 --autocast bfloat16 --lr_schedule cosine --warmup_steps 100 \
        --max_grad_norm 1.0 --save_steps 1000 --num_workers 1 --augment_order random_resized_crop "$@"
    $python export.py --checkpoint "$work/runs-$name"/*/latest --output "$work/$name" --dtype float32
}

collect libero_spatial_base --num_demos_per_task 50
train pushed $work/random --dataset_name libero_spatial_base --action_head l1 --num_images_in_input 2 --use_proprio True \
    --learning_rate 1e-3 --max_steps 4000
collect libero_spatial_clean --num_demos_per_task 40 --perturbation 0
train clean $work/pushed --dataset_name libero_spatial_clean --action_statistics base --learning_rate 6e-4 --max_steps 2000
cp checkpoints/openvla-tiny-oft/README.md $work/clean/ # the model card
rm -rf checkpoints/openvla-tiny-oft && cp -r $work/clean checkpoints/openvla-tiny-oft
$python eval.py --pretrained_checkpoint checkpoints/openvla-tiny-oft --task_ids 1 2 3 4 5 6 7 8 9 --num_trials_per_task 20 --render_quality fast
