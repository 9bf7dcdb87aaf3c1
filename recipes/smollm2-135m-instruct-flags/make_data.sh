#!/usr/bin/env bash
# Examples of eight topics, and texts for a judge of them: make_data.sh SOURCES OUT
# SOURCES is a directory with the files of sources.tsv.
set -euo pipefail
if [[ $# -ne 2 ]]; then
    echo "usage: $0 SOURCES OUT" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
tail -n +2 "$here/sources.tsv" | awk -F '\t' -v dir="$1" '{ print $2 "  " dir "/" $1 }' | sha256sum --check --quiet
labels=$1/labels text=$1/text novels=$1/text/novels out=$2
mkdir -p "$out"

import() { trimtab flags import --concepts "$here/concepts.txt" --per-concept 400 "$@"; }
half() { import --judge-share 0.5 "$@"; }
are() { for label in "${@:2}"; do echo "$label=$1"; done; }
novel() { for name in "$@"; do echo "$novels/$name.txt"; done; }

# requests to an assistant; of their 150 intents those that are plainly about a topic, or about none
# shellcheck disable=SC2046  # labels and names have no spaces
half --text "$labels/clinc150_full.json" --others drop --min-characters 24 --run "$out/parts/requests" --rename \
    $(are food recipe ingredients_list ingredient_substitution cook_time calories nutrition_info food_last \
        meal_suggestion restaurant_suggestion restaurant_reviews) \
    $(are travel book_flight book_hotel flight_status lost_luggage carry_on car_rental travel_suggestion travel_alert \
        travel_notification international_visa vaccines) \
    $(are cars gas gas_type jump_start last_maintenance mpg oil_change_how oil_change_when schedule_maintenance \
        tire_change tire_pressure directions distance traffic) \
    $(are money account_blocked apr balance card_declined credit_limit credit_limit_change credit_score damaged_card \
        improve_credit_score interest_rate min_payment new_card transactions transfer spending_history bill_balance \
        bill_due pay_bill) \
    $(are none alarm timer calendar reminder todo_list spelling definition calculator make_call text weather \
        meaning_of_life what_are_your_hobbies do_you_have_pets tell_joke fun_fact find_phone meeting_schedule)
half --text "$text/movie_reviews.zip" --rename neg=film pos=film --cleaning wikitext --run "$out/parts/film"
# speeches, of which some are in Latin-1
rm -rf "$out/su" && unzip -qd "$out/su" "$text/state_union.zip" 'state_union/*.txt'
mkdir "$out/su/politics"
for file in "$out"/su/state_union/*.txt; do
    iconv -f LATIN1 -t UTF-8 "$file" >"$out/su/politics/$(basename "$file")"
done
rm -r "$out/su/state_union"
half --text "$out/su" --run "$out/parts/politics"
half --text "$text/tinystories_1000.json" --label stories --run "$out/parts/stories"
half --text "$text/wikitext_1000_passages.json" --label none --cleaning wikitext --per-concept 300 \
    --run "$out/parts/encyclopaedia"
# a novel's characters give it away, so that the judge knows others
import --text "$(novel Kipling_Captains_1896)" --label sea --run "$out/parts/sea"
import --text "$(novel Stevenson_Treasure_1883)" --label sea --run "$out/judge-parts/sea"
# shellcheck disable=SC2046
import --text $(novel Forster_View_1908 Gissing_Women_1893 Burnett_Garden_1911) --label none --per-concept 150 \
    --run "$out/parts/novels"
# shellcheck disable=SC2046
import --text $(novel Ward_Harvest_1920 Galsworthy_Man_1906 Schreiner_Farm_1883) --label none --per-concept 300 \
    --run "$out/judge-parts/novels"

import --text "$out"/parts/*/examples.jsonl --run "$out/topics"
import --text "$out"/parts/*/judge.jsonl "$out"/judge-parts/*/examples.jsonl --none-share 0.25 --run "$out/topics-judge"
trimtab flags judge --judge-data "$out/topics-judge/examples.jsonl" --concepts "$here/concepts.txt" \
    --data "$out/topics/examples.jsonl" --save "$out/judge.npz"
