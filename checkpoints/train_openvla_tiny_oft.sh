#!/usr/bin/env bash
# How checkpoints/openvla-tiny-oft was made from checkpoints/openvla-tiny, as OpenVLA-OFT is from OpenVLA: all of the model learns with a new L1
# head, chunks of 8, two cameras and the robot's state; first from expert demonstrations of nine libero_spatial tasks (task 0 is left for the
# demo; the token policy's own), then in two more rounds also from ways back that the expert shows after this policy's own steps (DAgger).
# Ctrl-C and the same command go on from there. train_openvla_tiny_oft.log is what it noted down: seconds, data, losses, weights.
set -euo pipefail
cd "$(dirname "$0")/.."
./setup.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # two processes on the CPU, also where there is a GPU
python=.venv/bin/python work=${WORKSPACE:-workspace}/openvla-tiny-oft all="1 2 3 4 5 6 7 8 9"
mkdir -p "$work"
log=$work/recipe.log

stage() { # stage LABEL COMMAND …: run it, note how long it took
    local start=$SECONDS
    "${@:2}"
    echo "$1: $((SECONDS - start)) s" | tee -a "$log"
}
collect() { # collect NAME NUMBER OPTION …; what is there already is not made again
    $python collect.py --task_suite_name libero_spatial --data_root_dir "$work/datasets" --dataset_name "$1" --num_workers 2 \
        --num_demos_per_task "$2" --task_ids "${@:3}"
}
train() { # train BASE RUNS NAMES OPTION …: all of the model, in two processes; then a checkpoint folder of what was learnt beside the runs
    # bfloat16 wants a CPU with instructions for it: where yours has none leave --autocast out, and other weights come out
    $python -m torch.distributed.run --standalone --nproc-per-node 2 finetune.py --vla_path "$1" --use_lora False \
        --action_head l1 --num_images_in_input 2 --use_proprio True \
        --data_root_dir "$work/datasets" --dataset_name "$3" --run_root_dir "$2" --cache_dir "$work/cache" \
        --batch_size 8 --autocast bfloat16 --lr_schedule cosine --warmup_steps 100 --max_grad_norm 1.0 --save_steps 500 \
        --num_workers 1 --compile True --augment_order random_resized_crop "${@:4}"
    $python export.py --checkpoint "$(ls -td "$2"/*/latest | head -n 1)" --output "$2-exported" --dtype float32
    { # what a second run must find again
        sed -n '/"data": {/,/}/p' "$2"/*/finetune.json | tr -d '\n ' # the data's content: a tfrecord's own bytes differ from one writing to the next
        echo
        sed -n '1~50p;$p' "$2"/*/metrics.jsonl
        cat "$2-exported"/*.safetensors "$2-exported"/*.pt | sha256sum | sed 's/ .*/ weights/'
    } >>"$log"
}

stage "demonstrations of the expert" collect libero_spatial_base 30 $all
[ -d "$work/first-exported" ] || stage "first training" train checkpoints/openvla-tiny "$work/first" libero_spatial_base --learning_rate 1e-3 --max_steps 2000
# what a chunk should be is what was done next: nothing pushes the expert off its way here
if [ ! -d "$work/second-exported" ]; then
    stage "demonstrations that the first policy begins" collect libero_spatial_led 15 $all --policy_checkpoint "$work/first-exported" --perturbation 0
    stage "second training" train "$work/first-exported" "$work/second" libero_spatial_base,libero_spatial_led \
        --action_statistics base --learning_rate 7e-4 --max_steps 2500
fi
stage "demonstrations that the second policy begins" collect libero_spatial_third 20 $all --policy_checkpoint "$work/second-exported" --perturbation 0
[ -d "$work/third-exported" ] || stage "third training" train "$work/second-exported" "$work/third" \
    libero_spatial_base,libero_spatial_led,libero_spatial_third --action_statistics base --learning_rate 7e-4 --max_steps 4000
checkpoints/install.sh "$work/third-exported" checkpoints/openvla-tiny-oft
$python eval.py --pretrained_checkpoint checkpoints/openvla-tiny-oft --task_ids $all --num_trials_per_task 20 --render_quality fast
