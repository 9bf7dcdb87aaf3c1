"""Names of the files that the commands of policies leave in a run."""

EVALUATION_FILE, ITEMS_FILE = "evaluation.json", "evaluation_items.parquet"
HEADROOM_FILE = "headroom.json"
JUDGE_FILE = "judge.jsonl"
ANALYSIS_DIRECTORY = "analysis"
