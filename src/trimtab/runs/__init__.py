"""Run directories, configs, typed values, provenance, atomic files and splits. No torch."""

from trimtab.runs.atomic import (
    atomic_directory,
    atomic_path,
    read_json,
    write_bytes,
    write_json,
    write_table,
    write_text,
)
from trimtab.runs.cache_directory import cache_dir
from trimtab.runs.checks import check_choices, check_least, check_values
from trimtab.runs.config import (
    LEFT_OUT_AT_DEFAULT,
    FieldDifference,
    config_dict,
    config_difference,
    config_directory,
    json_safe,
    part_of,
)
from trimtab.runs.executors import Done, Failed, InProcess, OnRay, Processes, run_stage
from trimtab.runs.inputs import OutputPath, SourceName, path_of_run, paths_of_run
from trimtab.runs.keywords import as_path, known_arguments, plain, read_keywords, whole_number, whole_numbers
from trimtab.runs.metrics_log import read_metrics
from trimtab.runs.named import find_class, keyword_types, registered_class
from trimtab.runs.progress import Meter
from trimtab.runs.provenance import machine, sha256_file, utc_now, versions
from trimtab.runs.record import read_record
from trimtab.runs.renamed import command_now, new_name
from trimtab.runs.run import Run, Status
from trimtab.runs.shipped import ASSETS, shipped_directory, shipped_names
from trimtab.runs.splits import split_ids, text_id
from trimtab.runs.temporary import kept_or_temporary
from trimtab.runs.typed import field_docs, field_types, option_name, read_options, read_typed, takes_list

__all__ = [
    "ASSETS",
    "LEFT_OUT_AT_DEFAULT",
    "Done",
    "Failed",
    "FieldDifference",
    "InProcess",
    "Meter",
    "OnRay",
    "OutputPath",
    "Processes",
    "Run",
    "SourceName",
    "Status",
    "as_path",
    "atomic_directory",
    "atomic_path",
    "cache_dir",
    "check_choices",
    "check_least",
    "check_values",
    "command_now",
    "config_dict",
    "config_difference",
    "config_directory",
    "field_docs",
    "field_types",
    "find_class",
    "json_safe",
    "kept_or_temporary",
    "keyword_types",
    "known_arguments",
    "machine",
    "new_name",
    "option_name",
    "part_of",
    "path_of_run",
    "paths_of_run",
    "plain",
    "read_json",
    "read_keywords",
    "read_metrics",
    "read_options",
    "read_record",
    "read_typed",
    "registered_class",
    "run_stage",
    "sha256_file",
    "shipped_directory",
    "shipped_names",
    "split_ids",
    "takes_list",
    "text_id",
    "utc_now",
    "versions",
    "whole_number",
    "whole_numbers",
    "write_bytes",
    "write_json",
    "write_table",
    "write_text",
]
