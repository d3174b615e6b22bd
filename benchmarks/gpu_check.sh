#!/usr/bin/env bash
# Everything that a GPU should be asked, in one command of at most ten minutes, on a machine with torch and no network.
#
#   benchmarks/gpu_check.sh [--seconds 600] [--only kernels,peers] [--out FOLDER] [--wheels FOLDER] [--python PYTHON]
#                           [--rehearse]
#
# Each part has its own time limit; one that fails, or for which a package or time is missing, is noted, and the next
# one runs. Results: FOLDER (benchmarks/results/CARD/) with a JSON file of each part, check.md (what ran, how long),
# report.md (all figures), training.png (samples) and logs/. Exit status: how many parts failed.
#
# --wheels: a folder of wheels of what the machine lacks. They are unpacked beside the tree for this run only. Made
#   where there is a network: pip wheel --no-deps -w FOLDER hydra-core omegaconf antlr4-python3-runtime==4.9.3 ...
# --rehearse: the same parts in miniature, also on a CPU; shows that every command still works.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
seconds= only= out= wheels= rehearse=
while (($#)); do
  case $1 in
    --seconds | --only | --out | --wheels | --python)
      (($# > 1)) || { echo "gpu_check: $1 wants a value" >&2; exit 64; }
      declare "${1#--}=$2"
      shift 2
      ;;
    --rehearse) rehearse=1 && shift ;;
    -h | --help) sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) echo "gpu_check: $1 is not known; see --help" >&2 && exit 64 ;;
  esac
done
[[ $out && $out != /* ]] && out=$PWD/$out
[[ $wheels && $wheels != /* ]] && wheels=$PWD/$wheels
cd "$root" || exit 64
SECONDS=0
summary_seconds=25 # kept for the report
slowness=$((rehearse ? 5 : 1)) # a CPU that others use as well
deadline=$((${seconds:-$((600 * slowness))} - summary_seconds))

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ $wheels ]]; then
  for wheel in "$wheels"/*.whl; do
    "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/site" --upgrade "$wheel" 2>"$scratch/error" ||
      echo "gpu_check: $(basename "$wheel") does not install: $(tail -1 "$scratch/error")"
  done
  export PYTHONPATH=$scratch/site:$PYTHONPATH
fi

card=$("$python" -c '
import torch
from benchmarks import record
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(device.type, record.slug(record.device_name(device)))') || exit 70
if [[ $card == cpu* && ! $rehearse ]]; then
  echo "gpu_check: torch sees no GPU. Use --rehearse to try the commands on a CPU." >&2
  exit 69
fi
out=${out:-benchmarks/results/${card#* }}
mkdir -p "$out/logs" || exit 73
table=$scratch/table
ran= failed=0

wanted() { [[ ! $only || ,$only, == *,$1,* ]]; }

note() { # NAME, WHAT, SECONDS
  printf '| %s | %s | %s |\n' "$1" "$2" "$3" >>"$table"
  printf 'gpu_check: %-18s %s (%s s)\n' "$1" "$2" "$3"
}

lacking() { # MODULE...: prints those that can't be imported
  "$python" - "$@" <<'END'
import importlib, sys
def there(name):
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True
print(*(name for name in sys.argv[1:] if not there(name)))
END
}

part() { # NAME, LIMIT in seconds, MODULES that it needs, COMMAND...
  local name=$1 limit=$(($2 * slowness)) modules=$3 missing status begun left
  shift 3
  wanted "$name" || return 0
  ran=1
  # shellcheck disable=SC2086
  missing=$(lacking $modules)
  [[ $missing ]] && { note "$name" "skipped: $missing can't be imported" 0; return 0; }
  left=$((deadline - SECONDS))
  ((left < 5)) && { note "$name" "skipped: no time left" 0; return 0; }
  ((limit > left)) && limit=$left
  begun=$SECONDS
  timeout --kill-after=10 "$limit" "$@" >"$out/logs/$name.log" 2>&1
  status=$?
  case $status in
    0) note "$name" "ok" $((SECONDS - begun)) ;;
    124 | 137) failed=$((failed + 1)) && note "$name" "FAILED: stopped after its $limit s" $((SECONDS - begun)) ;;
    *) failed=$((failed + 1)) && note "$name" "FAILED: status $status, see logs/$name.log" $((SECONDS - begun)) ;;
  esac
}

# What is run, by part: full size, or a miniature of the same commands.
if [[ $rehearse ]]; then
  tests="tests/kernels/test_swiglu.py -k keeps_its_input"
  kernels="--small --no-compile --seconds 0.02 --only swiglu,bias_act,adamw8bit"
  tiny="recipe=faces32 resolution=16 model.channel_base=256 batch=8 data.builtin_count=16"
  gan="$tiny vram=6GB --steps 1 --warmup 1"
  ldm="recipe=faces64_ldm batch=4 vram=6GB --steps 1 --warmup 1"
  prediction="--recipes faces32:8 --policies plain"
  denoiser="recipe=faces64_ldm batch=4 --steps 1"
  peers="--small --seconds 1 --only diffusers_unet,timm_vit"
  fine_tuning="recipe=sd15_lora memory=recipe resolution=64 data.builtin_count=4 data.workers=0 --steps 1 --warmup 1"
  fine_tuning="$fine_tuning --json $out/fine_tuning.json"
  energy_seconds=0.3
  quality="recipe=faces32,faces32_fast resolution=16 model.channel_base=256 batch=8 data.builtin_count=16 kimg=0.016"
  quality="$quality points=1 n=8 feature_size=32 shown=4"
  training="$tiny kimg=0.064 log_kimg=0.016 snapshot_kimg=0.032 grid=4 --seconds 60"
else
  tests="tests/kernels"
  kernels="--seconds 0.1"
  gan="recipe=faces256 vram=6GB --steps 10"
  ldm="recipe=faces256_ldm vram=6GB --steps 10"
  prediction="--recipes faces256,faces256_ldm --policies plain,6GB"
  denoiser="recipe=faces256_ldm batch=16 micro_batch.denoiser=16"
  fine_tuning="-m recipe=sd15_finetune,sd15_lora,sd15_textual_inversion,sdxl_lora,sdxl_finetune vram=4GB,6GB"
  fine_tuning="$fine_tuning data.builtin_count=8 out=$out --steps 5"
  peers="--seconds 3 --only diffusers_unet,torchvision_resnet50,timm_vit,stylegan2" # kernels has the optimizers
  energy_seconds=8
  quality="recipe=faces256,faces256_fast vram=6GB seconds=120 points=4 n=1000 data.builtin_count=2000 measure_on=cuda"
  training="recipe=faces64 batch=64 vram=6GB snapshot_kimg=5 data.builtin_count=2000 --seconds 45"
fi
[[ $(lacking xdist) ]] || tests="$tests -n $(($(nproc) < 8 ? $(nproc) : 8)) --dist worksteal"
hydra="hydra omegaconf"
faces="dicebear dicebear_styles resvg_py"

if wanted environment; then
  {
    nvidia-smi || echo "no nvidia-smi"
    "$python" -c 'import json, sys; from benchmarks import record
print(json.dumps(record.environment(sys.argv[1]), indent=1))' "${card% *}"
  } >"$out/logs/environment.txt" 2>&1
fi

# The most important first: what comes last may find no time left. Nothing runs beside what is timed.
# shellcheck disable=SC2086
{
  # The pytest options of pyproject.toml want packages that may not be there.
  part kernel_tests 120 "pytest hypothesis" \
    "$python" -m pytest -q -o addopts=--strict-markers -p no:cacheprovider $tests
  part kernels 200 "" "$python" -m benchmarks.kernels $kernels --json "$out/kernels.json"
  part gan_step 60 "$hydra" "$python" -m benchmarks.train_step $gan --json "$out/gan_step.json"
  part diffusion_step 60 "$hydra" "$python" -m benchmarks.train_step $ldm --json "$out/diffusion_step.json"
  part training 110 "$hydra $faces" \
    "$python" -m benchmarks.short_training $training --grid "$out/training.png" --json "$out/training.json"
  part memory_prediction 110 "$hydra" \
    "$python" -m benchmarks.memory_prediction $prediction --json "$out/memory_prediction.json"
  part peers 120 "" "$python" -m benchmarks.peers $peers --json "$out/peers.json"
  # Random weights of the published sizes: memory and speed are those of the published ones.
  part fine_tuning 400 "$hydra transformers peft" \
    "$python" -m benchmarks.train_step $fine_tuning weights=random batch=1
  part energy 60 "pynvml $hydra" "$python" -m benchmarks.energy seconds=$energy_seconds json="$out/energy.json"
  part fast_gan 420 "$hydra $faces torch_fidelity efficientnet_lite_pytorch" \
    "$python" -m benchmarks.time_to_quality $quality out="$out/fast_gan"
  part denoiser_step 45 "$hydra diffusers" "$python" -m benchmarks.denoiser_step $denoiser --json "$out/denoiser_step.json"
}
[[ $ran ]] || { echo "gpu_check: --only $only names no part" >&2; exit 64; }

{
  echo "# GPU check: ${card#* }"
  echo
  echo "$(date -u +%Y-%m-%d), $SECONDS seconds$([[ $rehearse ]] && echo ", rehearsed: the figures mean nothing")."
  echo
  echo "| part | result | seconds |"
  echo "|---|---|---:|"
  cat "$table"
} >"$out/check.md"
timeout $(((summary_seconds + 15) * slowness)) "$python" -m benchmarks.report "$out" --out "$out" >"$out/logs/report.log" 2>&1 ||
  echo "gpu_check: no report.md: $(tail -1 "$out/logs/report.log")"
cat "$out/check.md"
[[ -f $out/report.md ]] && cat "$out/report.md"
exit "$failed"
