"""The end of a run: its model directory with curves and log, and the run's own directory tidied."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from quant.model_directory import Manifest, publish_directory, write_manifest
from training.run_log import CSV_NAME, plot_run
from training.settings import AdapterSettings
from training.trunk import Trunk, copy_text_files, write_weights


def finish_run(
    trunk: Trunk, out: Path, run_dir: Path, manifest: Manifest, adapters: AdapterSettings, *, files: tuple[Path, ...] = ()
) -> None:
    """Publish `out` whole: weights, tokenizer, chat format, manifest, log.csv, training.png and `files`.

    The checkpoints go then; the log and its TensorBoard events stay in the run's directory.
    """
    picture = plot_run(run_dir, f"{manifest.stage}: {out.name}")
    with publish_directory(out) as partial:
        write_weights(trunk, partial, adapters)
        copy_text_files(trunk.source, partial)
        write_manifest(partial, manifest)
        for path in (picture, run_dir / CSV_NAME, *files):
            shutil.copyfile(path, partial / path.name)
    for checkpoint in run_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    print(f"{out} written", file=sys.stderr)
