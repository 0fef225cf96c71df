"""The model card of a finished student: what it was made from and how, as README.md in its folder (huggingface_hub)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from distill.checkpoints.folder import read_config
from distill.checkpoints.sampling import Sampling
from distill.common.files import replacing
from distill.models.conditioning import conditioning_of
from distill.training.prepare import PreparedStage
from distill.training.recipes import Recipe
from distill.training.student.lora import KOHYA_FILE, LORA_FILE

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def write_card(
    out: Path, recipe: Recipe, stages: Sequence[PreparedStage], about: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Writes `out`/README.md. `about` is what the student's slimxl.json says of it, `run` what it was trained on. Local
    files are called by their last name: a card says nothing of the machine it was written on."""
    last = stages[-1]
    base = str(last.previous or last.stage.teacher) if last.stage.student.adapter else None
    pipeline = conditioning_of(read_config(last.pipeline, "unet")).pipeline
    data = {str(one.latents.key.get("data", "")) for one in stages}
    teachers = list(run["teachers"])
    metadata = ModelCardData(
        base_model=[name for name in ([base] if base else teachers) if _is_on_hub(name)] or None,
        base_model_relation="adapter" if base else None,
        datasets=sorted(name.removeprefix("hf:") for name in data if name.startswith("hf:")) or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["distillation", "slimxl", *(["lora"] if base else [])],
        license="other",
        license_name="as-the-base-model",
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {recipe.name}",
        _summary(about, base),
        _usage(pipeline, base, Sampling(**about["sampling"]) if "sampling" in about else Sampling()),
        "## Teachers",
        "\n".join(
            f"- {_shown(name)} (sha256 of its files `{digest[:12]}`)" for name, digest in run["teachers"].items()
        ),
        "## Licence",
        "The student is made from its teachers' weights, and so their licences hold for it, and the terms of the data.",
        "## Data",
        "\n".join(sorted(f"- {_shown(name)}" for name in data)),
        "## Recipe",
        _stages(recipe),
        f"Batch {recipe.batch_size}, caption dropout {recipe.caption_dropout:g}, weight decay {recipe.weight_decay:g}, "
        f"average (EMA) {recipe.ema_decay or 'none'}, seed {recipe.seed}, {run['optimizer']}, mixed precision "
        f"{run['mixed_precision']}. The whole recipe is in slimxl.json: `python -m distill recipe slimxl.json` prints it.",
        "## Losses",
        _losses(out / "losses.jsonl"),
        *_pictures(out, recipe, stages),
    ]
    with replacing(out / "README.md") as temporary:
        ModelCard("\n\n".join(sections) + "\n").save(temporary)


def _summary(about: Mapping[str, Any], base: str | None) -> str:
    if base is None:
        return f"A student of {about['parameters']:,} UNet parameters ({about['student']}), distilled by slimxl."
    return (
        f"A {about['student']}, {about['parameters']:,} parameters, for the UNet of {_shown(base)}, distilled by slimxl. "
        f"`{LORA_FILE}` has diffusers' names, `{KOHYA_FILE}` is the same under kohya's; both are used at scale 1."
    )


def _usage(pipeline: str, base: str | None, sampling: Sampling) -> str:
    """A few lines of diffusers. A whole pipeline has its scheduler in its folder."""
    imported = [pipeline]
    lines = [f"pipe = {pipeline}.from_pretrained(FOLDER)"]
    if base is not None:
        lines = [f'pipe = {pipeline}.from_pretrained("{_shown(base)}")', "pipe.load_lora_weights(FOLDER)"]
        if sampling.scheduler:
            imported.append(sampling.scheduler)
            settings = "".join(f", {name}={value!r}" for name, value in sampling.settings.items())
            lines.append(f"pipe.scheduler = {sampling.scheduler}.from_config(pipe.scheduler.config{settings})")
    arguments = "".join(f", {name}={value}" for name, value in sampling.call_arguments.items())
    lines = [
        f"from diffusers import {', '.join(sorted(imported))}",
        "",
        *lines,
        f"image = pipe(PROMPT{arguments}).images[0]",
    ]
    return "\n".join(["```python", *lines, "```"])


def _is_on_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _shown(name: str) -> str:
    """A hub id, `shapes:N` or the like as it is, a local path by its last part."""
    return name if _is_on_hub(name) or re.match(r"[a-z]{2,}:", name) else Path(name).name


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ("---",) * len(header), *rows))


def _stages(recipe: Recipe) -> str:
    rows = []
    for stage in recipe.stages:
        objective = ", ".join(f"{key} {_value(value)}" for key, value in asdict(stage.objective).items())
        rate = f"{stage.learning_rate:g}, {stage.schedule.shape}"
        rows.append((stage.name, _shown(stage.teacher), stage.student.title, stage.steps, rate, objective))
    return _table(("stage", "teacher", "student", "steps", "learning rate", "objective"), rows)


def _value(value: Any) -> str:
    """A field as a recipe's file has it: `null`, not Python's None, and its own fields in braces."""
    return json.dumps(value) if value is None or isinstance(value, bool | dict) else str(value)


def _losses(log: Path) -> str:
    """The last logged step of each stage."""
    last = {line["stage"]: line for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
    rows = []
    for stage, line in last.items():
        groups: dict[str, float] = {}
        for name, value in line["terms"].items():
            group = name.partition("/")[0]
            groups[group] = groups.get(group, 0.0) + value
        terms = ", ".join(f"{name} {value:.4g}" for name, value in groups.items())
        rows.append((stage, line["step"], f"{line['loss']:.4g}", terms))
    return _table(("stage", "step", "loss", "terms, times their λ"), rows)


def _pictures(out: Path, recipe: Recipe, stages: Sequence[PreparedStage]) -> list[str]:
    """The last picture of each stage that was drawn."""
    names = [f"{prepared.title}.png" for prepared in stages]
    drawn = [name for name in names if (out / "samples" / name).exists()]
    if not drawn:
        return []
    prompts = "; ".join(recipe.validation_prompts)
    return ["## Pictures", f"After each stage, at fixed seeds: {prompts}", *(f"![{n}](samples/{n})" for n in drawn)]
