#!/usr/bin/env bash
# Compare the recipes on real stars: stars of high and of low S/N from SDSS, both recipes, five seeds, one table.
#
#   ./reproduce.sh [DIR]         all of it, in DIR (default: reproduction); the table is DIR/results.txt
#
# After an interruption the same command goes on where it was. Environment variables:
#   PYTHON=python                the interpreter with the packages of requirements.txt
#   STARS=80                     stars of each class M0 to M4 in each of the two sets
#   SEEDS="1 2 3 4 5"            of split and training
#   TRAIN_OPTIONS=""             more options of train.py
#   SERVERS=""                   --sas-url and --skyserver-url of download_sdss_data.py
#   DOWNLOAD_OPTIONS=""          more of its options
#   ALLOW_MISSING=""             1: go on without the stars in download_failures.csv
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
directory=${1:-reproduction}
python=${PYTHON:-python}

for snr in high low; do
  stars=$directory/$snr
  limit=$([ $snr = high ] && echo --min-snr || echo --max-snr)
  if [ ! -e "$stars/objects.csv" ]; then
    "$python" "$here/download_sdss_data.py" --query "${STARS:-80}" --data-dir "$stars" $limit 10 ${SERVERS:-}
  fi
  if ! "$python" "$here/download_sdss_data.py" --data-dir "$stars" ${SERVERS:-} ${DOWNLOAD_OPTIONS:-}; then
    [ -e "$stars/download_failures.csv" ] && [ -n "${ALLOW_MISSING:-}" ] || exit 1
  fi
done

for snr in high low; do
  stars=$directory/$snr
  mkdir -p "$stars/done"
  for seed in ${SEEDS:-1 2 3 4 5}; do
    for recipe in paper improved; do
      [ -e "$stars/done/$recipe-$seed" ] && continue
      "$python" "$here/train.py" --data-dir "$stars" --output-dir "$stars" --recipe $recipe --seed "$seed" \
        --test-split 0.2 --resume auto ${TRAIN_OPTIONS:-}
      touch "$stars/done/$recipe-$seed"
    done
  done
done

"$python" - "$directory" <<'TABLE' | tee "$directory/results.txt"
import sys

import pandas as pd

print("Weighted F1 on the held-out fifth of the stars: mean over seeds, standard error; difference: improved - paper.")
for snr in ("high", "low"):
    runs = pd.json_normalize(pd.read_json(f"{sys.argv[1]}/{snr}/training_history.json").to_dict("records"))
    runs = runs.drop_duplicates(["config.recipe", "config.random_seed"], keep="last")
    f1 = runs.pivot(index="config.random_seed", columns="config.recipe", values="final_metrics.final_test_f1_weighted")
    f1 = f1[["paper", "improved"]].assign(difference=f1["improved"] - f1["paper"])
    print(f"\n{snr} S/N: {runs['config.stars'].iloc[-1]}, {len(f1)} seeds")
    print(f1.agg(["mean", "sem"]).T.rename_axis(None).round(3).to_string(header=False))
TABLE
