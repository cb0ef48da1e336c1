#!/usr/bin/env bash
# How checkpoints/openvla-tiny was made, from nothing: expert demonstrations of nine libero_spatial tasks (task 0 is left for the demo), all of the
# small model from random weights, then three more rounds, each on all demonstrations so far and new ones that the policy so far has begun and the
# expert ended (DAgger).
# Ctrl-C and the same command go on from there. train_openvla_tiny.log is what it noted down: seconds, data, losses, weights.
set -euo pipefail
cd "$(dirname "$0")/.."
./setup.sh
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= # two processes on the CPU, also where there is a GPU
python=.venv/bin/python work=${WORKSPACE:-workspace}/openvla-tiny-four-rounds name=libero_spatial_base all="1 2 3 4 5 6 7 8 9"
mkdir -p "$work"
log=$work/recipe.log

stage() { # stage LABEL COMMAND …: run it, note how long it took
    local start=$SECONDS
    "${@:2}"
    echo "$1: $((SECONDS - start)) s" | tee -a "$log"
}
collect() { # collect NUMBER TASKS OPTION …: more, into the one data set
    $python collect.py --task_suite_name libero_spatial --data_root_dir "$work/datasets" --dataset_name $name --num_workers 2 \
        --num_demos_per_task "$1" --task_ids "${@:2}"
}
train() { # train BASE NAME OPTION …: all of the model, in two processes; then NAME-exported, a checkpoint folder of what was learnt
    # bfloat16 wants a CPU with instructions for it: where yours has none leave --autocast out, and other weights come out
    $python -m torch.distributed.run --standalone --nproc-per-node 2 finetune.py --vla_path "$work/$1" --use_lora False \
        --data_root_dir "$work/datasets" --dataset_name $name --run_root_dir "$work/$2" --cache_dir "$work/cache" \
        --batch_size 8 --autocast bfloat16 --lr_schedule cosine --warmup_steps 100 --max_grad_norm 1.0 --save_steps 500 \
        --num_workers 1 --augment_order random_resized_crop "${@:3}"
    $python export.py --checkpoint "$(ls -td "$work/$2"/*/latest | head -n 1)" --output "$work/$2-exported" --dtype float32
    { # what a second run must find again
        sed -n '/"data": {/,/}/p' "$work/$2"/*/finetune.json | tr -d '\n ' # the data's content: a tfrecord's own bytes differ from one writing to the next
        echo
        sed -n '1~50p;$p' "$work/$2"/*/metrics.jsonl
        sha256sum "$work/$2-exported/model.safetensors" | sed 's/ .*/ weights/'
    } >>"$log"
}

[ -d "$work/random" ] || $python checkpoints/make_openvla_tiny.py "$work/random"
stage "demonstrations of the expert" collect 20 $all
[ -d "$work/first-exported" ] || stage "first training" train random first --learning_rate 1e-3 --max_steps 3000
dagger() { # dagger FROM TO NUMBER STEPS: so many more demonstrations a task that one policy begins; the next one learns from all so far
    stage "demonstrations that the $1 policy begins" collect "$3" $all --policy_checkpoint "$work/$1-exported"
    [ -d "$work/$2-exported" ] || stage "$2 training" train "$1-exported" "$2" --learning_rate 7e-4 --max_steps "$4"
}
dagger first second 12 2500
dagger second third 15 3000
dagger third fourth 24 6000
checkpoints/install.sh "$work/fourth-exported" checkpoints/openvla-tiny
$python eval.py --pretrained_checkpoint checkpoints/openvla-tiny --task_ids $all --num_trials_per_task 20 --render_quality fast
