"""The model card: what a run and its checkpoint say of themselves, set into the template."""

import statistics
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..adapters.bases import BASE_CONFIG
from ..common.files import atomic_write, read_json, read_log
from ..common.packaged import resolve
from ..common.run_folder import CURVE, PICTURES, RESULTS, RUN_CONFIG
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE
from .facts import Facts, human_size

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
CARD, SUMMARY = "README.md", "training_summary.json"
# What only the people behind a model know: a JSON file in the run folder.
CARD_FACTS = "card.json"
FACT_KEYS = ("base_model", "datasets", "description", "hardware", "languages", "license", "time")
FACT_LISTS = ("datasets", "languages")
CHANCE = 50.0
# Kyutai's weights and everything that derives from them.
LICENSE = "cc-by-4.0"
TAGS = ["moshi", "moshi-ttt", "test-time-training", "speech", "full-duplex", "spoken-dialogue"]
# What of a run's settings the card's table shows: (in run_config.json, in the card).
SHOWN = (
    ("mode", "mode"),
    ("model.path", "started from"),
    ("data.train", "training data"),
    ("data.window_seconds", "window (s)"),
    ("data.carry", "carried from window to window"),
    ("data.batch_size", "batch size a process"),
    ("data.accumulation", "gradient accumulation"),
    ("optim.steps", "steps"),
    ("optim.lr", "learning rate"),
    ("optim.ttt_lr", "learning rate of TTT weights"),
    ("optim.gate_lr", "learning rate of gates"),
    ("optim.schedule", "schedule"),
    ("optim.weight_decay", "weight decay"),
    ("lora.rank", "LoRA rank"),
    ("lora.scaling", "LoRA scaling"),
    ("seed", "seed"),
)


def write_card(folder: Path, repo_id: str, kind: str, facts: Facts) -> None:
    """Render README.md for a staged folder from what lies in it: configuration, run_config.json, results.json and pictures."""
    run, results, summary, details = (_optional(folder / name) for name in (RUN_CONFIG, RESULTS, SUMMARY, CARD_FACTS))
    config = read_json(folder / (BASE_CONFIG if kind == "adapter" else "config.json"))
    window = config["sliding_window"]  # null: attention sees everything
    fresh = resolve("model", str(run.get("model", {}).get("path", ""))).endswith(".json")
    rows = evaluation_rows(results)
    base = facts.base or details.get("base_model") or _hub_name(run.get("model", {}).get("path", ""))
    data = ModelCardData(
        language=details.get("languages") or ["en"],
        license=details.get("license", "apache-2.0" if fresh else LICENSE),
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="audio-to-audio",
        tags=TAGS,
        base_model=base or None,
        base_model_relation=("adapter" if kind == "adapter" else "finetune") if base else None,
        datasets=details.get("datasets"),
        model_name=repo_id.split("/")[-1] if rows else None,
        eval_results=[row["result"] for row in rows] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        repo_name=repo_id.split("/")[-1],
        kind=kind,
        base=base,
        processor=(folder / "processor_config.json").is_file(),
        ttt_layers=_spans(facts.ttt_layers),
        ttt_mixer="linear" if facts.ttt_mixer == "linear" else "two-layer",
        window=window,
        window_seconds=None if window is None else round(window / FRAME_RATE, 1),
        facts=fact_rows(facts, config),
        training=training_rows(run, summary, details),
        description=details.get("description", ""),
        evaluation=rows,
        curve=(folder / CURVE).is_file(),
        long_context=long_context_pictures(folder, results),
        languages=", ".join(details.get("languages", [])),
        license=data.license,
    )
    atomic_write(folder / CARD, card.content)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _hub_name(path: str) -> str:
    """The base model's repository, where the run started from one and not from a folder or a configuration."""
    return path if path.count("/") == 1 and not path.endswith(".json") and not Path(path).exists() else ""


def _spans(layers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1–3, 7"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}–{span[-1]}" for span in spans)


def fact_rows(facts: Facts, config: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of what the checkpoint holds."""
    rows = [("parameters", f"{facts.total:,}")]
    rows += [(f"… {kind}", f"{number:,}") for kind, number in facts.parameters.items()]
    rows += [("dtype", ", ".join(facts.dtypes)), ("size", human_size(facts.size))]
    if facts.ttt_layers:
        rows.append(("TTT layers", f"{_spans(facts.ttt_layers)}: {facts.ttt_mixer}, mini-batch {config['ttt_mini_batch_size']}"))
    rows.append(("codebooks", f"{config['num_codebooks']} of Moshi's, {config['num_user_codebooks']} of the user's"))
    return rows


def training_rows(run: dict[str, Any], summary: dict[str, Any], details: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of the settings that matter, of what the run reached and of what it took."""
    rows = []
    for key, name in SHOWN:
        value: Any = run
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            rows.append((name, str(value)))
    rows += [(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in summary.items()]
    return rows + [(key, str(details[key])) for key in ("hardware", "time") if details.get(key)]


def summarize(metrics: Path) -> dict[str, Any]:
    """The last losses, the best held-out loss, the median throughput and the peak memory of a run's metrics.jsonl."""
    lines = read_log(metrics)
    found: dict[str, Any] = {}
    for key in ("text_loss", "audio_loss", "eval_text_loss", "eval_audio_loss", "eval_text_accuracy"):
        values = [line[key] for line in lines if line.get(key) is not None]
        if values:
            found[f"last_{key}"] = values[-1]
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    memory = [line["peak_memory_gb"] for line in lines if line.get("peak_memory_gb")]
    if speeds:
        found["tokens_per_second"] = round(statistics.median(speeds))
    if memory:
        found["peak_memory_gb"] = round(max(memory), 2)
    return found


def check_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """card.json as it is; ValueError for a key that the card has no place for."""
    unknown = sorted(set(facts) - set(FACT_KEYS))
    if unknown:
        raise MoshiTTTError(f"{CARD_FACTS} holds {unknown[0]!r}; the card has places for {', '.join(FACT_KEYS)}")
    for key, value in facts.items():
        words = value if key in FACT_LISTS and isinstance(value, list) else [value]
        if not all(isinstance(word, str) for word in words) or (key in FACT_LISTS and words is not value):
            wanted = 'a list of texts, as in ["en"]' if key in FACT_LISTS else "a text"
            raise MoshiTTTError(f"{CARD_FACTS}: {key} is {value!r}; it must be {wanted}")
    return facts


def long_context_pictures(folder: Path, results: dict[str, Any]) -> list[str]:
    """The pictures of loss against position, as far as they are there."""
    names = [f"{PICTURES}/{name}.png" for name, part in results.get("tasks", {}).items() if part.get("kind") == "long_context"]
    return [name for name in names if (folder / name).is_file()]


def evaluation_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracies of the zero-shot tasks, for the card's table and as the Hub's own metadata, chance level and protocol included."""
    rows = []
    for part in results.get("tasks", {}).values():
        if part.get("kind") != "zero_shot":
            continue
        scoring = part.get("scoring", {})
        protocol = ", ".join(f"{key} {value}" for key, value in scoring.items())
        for task, result in part["tasks"].items():
            score = round(100 * result["accuracy"], 2)
            low, high = (round(100 * bound, 1) for bound in result.get("interval") or (float("nan"), float("nan")))
            entry = EvalResult(
                task_type="audio-to-audio",
                dataset_type=task,
                dataset_name=task,
                metric_type="accuracy",
                metric_name=f"accuracy (chance {CHANCE:.0f})",
                metric_value=score,
                metric_args={"chance": CHANCE, "protocol": protocol},
            )
            interval = f"{low}–{high}" if low == low else "–"
            rows.append({"task": task, "score": score, "interval": interval, "chance": CHANCE, "protocol": protocol, "result": entry})
    return rows
