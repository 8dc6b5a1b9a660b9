#!/usr/bin/env bash
# The evidence for the embedded model's catalog, with the lab's own commands, as a user would run
# them: case files, discovery from scratch, calibration, cards, evaluation. About ten minutes on two
# cores. Run it after `python -m steerscope.demo.train`, which writes the catalog without all this.
set -euo pipefail
cd "$(dirname "$0")/.."

artifacts=plugin/steerscope/demo/artifacts
cases=$artifacts/cases
reports=docs/demo
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
steerscope() { .venv/bin/steerscope "$@"; }

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR
run=(--model $artifacts/model --declines $cases/declines.txt --whole --max-tokens 16
  --vllm '{"dtype": "float32", "max_model_len": 128, "enforce_eager": true}')

mkdir -p $cases
steerscope demo cases declines --out $cases/declines.txt
# Dev has the mix of populations that test has: untaught facts of dev names are few.
steerscope demo cases evaluation --dev 40 --test 100 --out $cases/evaluation.jsonl
for file in positive negative side; do
  steerscope demo cases $file --fit 250 --dev 60 --test 150 --out "$work/$file.jsonl"
done

rm -rf $reports
steerscope lab discover --name known_entity --opposite unknown_entity --label known \
  --positive "$work/positive.jsonl" --negative "$work/negative.jsonl" --side "$work/side.jsonl" \
  --out "$work/discovered" "${run[@]}"
mkdir -p $reports/discovery
cp "$work"/discovered/{DISCOVERY.md,discovery.json} $reports/discovery/

# Platt's map has two numbers to learn. The classes are nearly separable, and a step function
# would tie most scores.
steerscope lab calibrate $artifacts/catalog --cases $cases/evaluation.jsonl --method platt \
  --relabel hallucination_risk --out $artifacts/catalog --report $reports/calibration "${run[@]}"

rm -rf $artifacts/catalog/cards
steerscope lab explain $artifacts/catalog --cases $cases/evaluation.jsonl \
  --feature unknown_entity --feature known_entity --feature entity_end \
  --feature states_sport --feature states_instrument --feature states_field \
  --feature known_entity_readout --feature answers_readout \
  --model $artifacts/model --max-tokens 16 \
  --vllm '{"dtype": "float32", "max_model_len": 128, "enforce_eager": true}'

steerscope lab evaluate $artifacts/catalog --cases $cases/evaluation.jsonl \
  --policy force-known --policy force-unknown --side-group side \
  --sae "saelens:$work/discovered/saes/resid_post.2-192-seed0" \
  --dose 0.5 --dose 1 --dose 1.5 --max-cases-per-group 40 \
  --self-report "How sure are you of that, from 0 to 100?" \
  --title "Evidence for the embedded model's catalog" --out $reports/evaluation "${run[@]}"
rm $reports/evaluation/cases.jsonl
