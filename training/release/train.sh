#!/bin/sh
# How causerie-tiny was made: `training/release/train.sh DATA WORK`. About two hours on one core.
# DATA holds pretrain/, sft/, preference/, prompts/, eval/ and licences.json; only rows that may ship are used.
set -eu
data=$1
work=$2
causerie() { python -m serving.cli "$@"; }

causerie train pretrain --out "$work/base" --seed 1 \
    --size palm-10m --length 512 --licences yes \
    --data "$data/pretrain/en_00.jsonl.gz" --conversations "$data/sft/train_en.jsonl.gz" \
    --eval-data "$data/sft/val.jsonl.gz" \
    --batch-size 8 --micro-batch-size 8 --learning-rate 3e-3 --max-steps 1200

# Short, plain answers: what a model of this size can learn to give.
causerie train sft --out "$work/sft" --seed 1 --model "$work/base" \
    --method full --length 512 --licences yes \
    --data "$data/sft/train_en.jsonl.gz" --eval-data "$data/sft/val.jsonl.gz" \
    --sources sgd_dialogue topical_chat dolly_15k_part rasbt_instruction oasst_en_100 gpteacher_roleplay \
    --batch-size 8 --micro-batch-size 4 --learning-rate 1e-3 --max-steps 350

causerie train reward --out "$work/reward" --seed 1 --model "$work/sft" \
    --method full --length 384 --licences yes \
    --data "$data/preference/train.jsonl.gz" --eval-data "$data/preference/test.jsonl.gz" \
    --batch-size 16 --micro-batch-size 8 --learning-rate 1e-4 --max-steps 60

causerie train ppo --out "$work/ppo" --seed 1 --model "$work/sft" --reward-model "$work/reward" \
    --method full --licences yes \
    --data "$data/prompts/train.jsonl.gz" --eval-data "$data/prompts/val.jsonl.gz" \
    --iterations 30 --rollout-size 32 --batch-size 32 --micro-batch-size 16 --max-new-tokens 64 \
    --max-prompt-tokens 256 --learning-rate 2e-5 --critic-learning-rate 1e-4 --critic-warmup 4 \
    --kl-control adaptive --kl-target 3 \
    --ptx mixture --ptx-coefficient 0.5 \
    --ptx-text "$data/pretrain/en_00.jsonl.gz" --ptx-conversations "$data/sft/train_en.jsonl.gz"

causerie quantize "$work/ppo" "$work/causerie-tiny" --group-size 32 --act-order --eight-bit down_proj --samples 128 --seq-len 256
