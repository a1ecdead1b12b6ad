#!/usr/bin/env bash
# Trains the models in kinema/assets, each from the ones before it:
#
#   bash checkpoints.sh wan streaming        also cogvideox, ursa, ttt; families can be trained side by side, on a GPU each
#
# Everything lies below $R. What is done is not done again, what was stopped goes on. $K is the kinema command, $S its
# shipping. All shipped models were made so (the students of ursa without graphs; of the first two stages of vae in wan the
# exact steps are not on record), but that of cogvideox, which took a longer way: its card tells it.
set -euo pipefail
R=${R:-runs/checkpoints} K=${K:-kinema} S=${S:-python -m kinema.shipping} N=${N:-512}
FAST="--run.plan.graph true --run.log_every 100 --run.save_every 2000 --run.keep 1"
HALF="--run.plan.compute bfloat16"
mkdir -p "$R"

# once NAME COMMAND...: runs a command unless it has succeeded before
once() {
  local name=$1; shift
  [ -e "$R/$name.done" ] && return
  echo "== $name"; "$@" && touch "$R/$name.done"
}

wan() {
  once text $K train sprites:text --out "$R/text"
  once vae $K train sprites:vae --out "$R/vae"
  once vae-whole $K train sprites:vae --frames 33 --batch_size 8 --run.init_from "$R/vae" --out "$R/vae-whole"
  once short $S base "$R/text" "$R/vae-whole" "$R/short"
  once vae-long $K train sprites:vae --start "$R/short" --frames 97 --batch_size 4 --steps 1760 --clips 2048 --lr 5e-4 $FAST \
    --out "$R/vae-long"
  once base $S base "$R/text" "$R/vae-long" "$R/base"
  once wan $K train sprites:wan --base "$R/base" $FAST $HALF --out "$R/wan"
  once sprites-wan $S model "$R/wan" "$R/sprites-wan"
  once score-wan $K evaluate "$R/sprites-wan" --n "$N" --batch 256 --out "$R/score-wan"
}

streaming() {
  local base=${BASE:-sprites-wan}
  once df $K train sprites:diffusion_forcing --base "$base" $FAST --out "$R/df"
  once pairs $K prepare sprites:ode_pairs --base "$base" --out "$R/pairs"
  once ode $K train sprites:ode_init --base "$base" --pairs "$R/pairs" --start "$R/df" $FAST --out "$R/ode"
  once dmd $K train sprites:dmd --base "$base" --start "$R/ode" $FAST --out "$R/dmd"
  once sprites-wan-causal $S model "$R/df" "$R/sprites-wan-causal" "$base"
  once sprites-wan-ode $S model "$R/ode" "$R/sprites-wan-ode" "$base"
  once sprites-wan-4step $S model "$R/dmd" "$R/sprites-wan-4step" "$base"
  for kind in dmd sid gan; do
    once $kind $K train sprites:$kind --base "$base" --start "$R/ode" $FAST --out "$R/$kind"
    once score-$kind $K evaluate "$R/$kind" --n "$N" --batch 128 --out "$R/score-$kind"
  done
}

cogvideox() {
  once cog-text $K train sprites:cogvideox_text --out "$R/cog-text"
  once cog-vae $K train sprites:cogvideox_vae $FAST --out "$R/cog-vae"
  once cog-whole $K train sprites:cogvideox_vae --frames 33 --batch_size 8 --run.init_from "$R/cog-vae" $FAST \
    --out "$R/cog-whole"
  once cog-base $S base "$R/cog-text" "$R/cog-whole" "$R/cog-base"
  once cog $K train sprites:cogvideox --base "$R/cog-base" --run.objective.times kinema.diffusion.times.Uniform \
    $FAST $HALF --out "$R/cog"
  once sprites-cogvideox $S model "$R/cog" "$R/sprites-cogvideox"
  once score-cog $K evaluate "$R/sprites-cogvideox" --n "$N" --batch 64 --out "$R/score-cog"
  once lora $K demo sprites:cogvideox_lora --base "$R/sprites-cogvideox" --steps 50 --videos 128 --out "$R/lora"
}

ursa() {
  once tokenizer $K train sprites:ursa_tokenizer --steps 14520 --batch_size 32 --clips 8192 --lr 1.5e-3 $FAST \
    --out "$R/tokenizer"
  once codes $S codes "$R/tokenizer" "$R/codes"
  once ursa $K train sprites:ursa --base "$R/codes" --steps 10760 --batch_size 128 --lr 1.5e-3 --block 64 $FAST $HALF \
    --out "$R/ursa"
  once sprites-ursa $S model "$R/ursa" "$R/sprites-ursa"
  local few="--teacher $R/sprites-ursa --lr 2e-4 $FAST $HALF"
  once 1step $K train sprites:ursa_dimo --steps 860 --batch_size 64 $few --out "$R/1step"
  once 2step $K train sprites:ursa_dimo --steps 760 --batch_size 64 --student_steps 2 $few --out "$R/2step"
  once 4step $K train sprites:ursa_dimo --steps 760 --batch_size 64 --student_steps 4 $few --out "$R/4step"
  once reinforce $K train sprites:ursa_reinforce --steps 780 --batch_size 32 $few --out "$R/reinforce"
  for name in 1step 2step 4step reinforce; do
    once sprites-ursa-$name $S model "$R/$name" "$R/sprites-ursa-$name" "$R/sprites-ursa"
  done
  once table $K evaluate "$R"/sprites-ursa-{1step,2step,4step,reinforce} --teacher "$R/sprites-ursa" \
    --teacher-steps 1,2,4,8,25,50 --n "$N" --batch 64 --out "$R/table"
}

ttt() {
  local before=
  for stage in 1x 3x 6x 12x 21x; do
    once ttt-$stage $K train sprites:ttt_$stage --base "${COG:-$R/sprites-cogvideox}" \
      ${before:+--previous "$R/ttt-$before"} --run.data.block 64 $FAST $HALF --out "$R/ttt-$stage"
    before=$stage
  done
  once sprites-ttt $S model "$R/ttt-21x" "$R/sprites-ttt" "${COG:-$R/sprites-cogvideox}"
  once score-ttt $K probe "$R/ttt-21x" --scenes 3 6 12 21 --n 64 --batch 64 --jobs 8
}

for family in "$@"; do "$family"; done
