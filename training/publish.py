"""The end of a run: its model directory with curves and log, and the run's own directory tidied."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from quant.model_directory import Manifest, publish_directory, write_manifest
from training.distributed import ONE_RANK, Ranks, full_tensors
from training.run_log import CSV_NAME, plot_run
from training.settings import AdapterSettings
from training.trunk import Trunk, copy_text_files, write_weights


def finish_run(
    trunk: Trunk,
    out: Path,
    run_dir: Path,
    manifest: Manifest,
    adapters: AdapterSettings,
    *,
    ranks: Ranks = ONE_RANK,
    files: tuple[Path, ...] = (),
) -> None:
    """Publish `out` whole: weights, tokenizer, chat format, manifest, log.csv, training.png and `files`.

    All ranks call it and the first one writes. The checkpoints go then; log and TensorBoard events stay in `run_dir`.
    """
    state = full_tensors(trunk.model)
    if not ranks.is_first:
        return
    picture = plot_run(run_dir, f"{manifest.stage}: {out.name}")
    with publish_directory(out) as partial:
        write_weights(trunk, partial, adapters, state)
        copy_text_files(trunk.source, partial)
        if trunk.chat_template is not None:
            (partial / "chat_template.jinja").write_text(trunk.chat_template, encoding="utf-8")
        write_manifest(partial, manifest)
        for path in (picture, run_dir / CSV_NAME, *files):
            shutil.copyfile(path, partial / path.name)
    for checkpoint in run_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    print(f"{out} written", file=sys.stderr)
