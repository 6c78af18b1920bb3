"""A study: several models under several representations, each pair evaluated, all compared.

Invariant: a pair whose evaluation stands under the same settings and in the same space (the same weights) is not evaluated again, so
that the same command continues a study; of a pair that changed, the record is replaced. A pair that fails is told at the end and stops
no other. How one pair is evaluated is for the caller to say.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_origin

import yaml

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.embedders.embedder import settle
from llmemb_ray.errors import ConfigError, LlmembError, NotFound, RunFailed
from llmemb_ray.evaluation import record
from llmemb_ray.evaluation.compare import Comparison, compare
from llmemb_ray.evaluation.contamination import Contamination
from llmemb_ray.evaluation.evaluate import contaminated
from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.storage import Access, Storage, absolute, locate, redact
from llmemb_ray.written import masked, parse_yaml

FIELDS = ("models", "variants", "suite", "settings", "about")

DEFAULT = "default"
"""Key of a value for the models that a mapping of values by model does not name."""

RESULT = "comparison.json"

SETTINGS = "study.json"
"""In a pair's directory: {"finished": whether its record is whole, "settings": those it is evaluated under}."""

OUT = "evaluation/study"

NOT_OF_THE_RESULT = frozenset(
    {"actors", "gpus_per_actor", "cpus_per_actor", "max_attempts", "retry_wait", "ray_address", "endpoint_url", "storage_options"}
    | {"storage_retry_seconds", "token_budget", "out", "study", "models", "runs", "compare", "contamination"}
)
"""Settings that change no figure: a pair is not evaluated again for them."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One model under one variant. directory: relative to the study's output."""

    model: str
    variant: str
    directory: str
    settings: EvaluateSettings

    @property
    def name(self) -> str:
        return f"{self.directory.partition('/')[0]} {self.variant}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """models: names; variants: name → settings, of which one may be a mapping of values by model; settings: of all pairs."""

    path: str
    models: list[str]
    variants: dict[str, dict[str, Any]]
    suite: list[str]
    settings: dict[str, Any] = field(default_factory=dict)


def load(path: str, settings: EvaluateSettings | None = None) -> Study:
    """Reads a study, local or from a URL. Raises ConfigError naming what is wrong in it."""
    storage, name = locate(absolute(path), settings.access if settings else Access())
    try:
        data = parse_yaml(storage.read(name).decode())
    except NotFound as error:
        raise ConfigError(f"study: {redact(path)} is not there; those of the papers are in jobs/reproduce") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"study {redact(path)} is not YAML" + (f", line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else "")) from error
    if not isinstance(data, dict):
        raise ConfigError(f"study {path}: a mapping with {', '.join(FIELDS[:3])} is wanted")
    unknown = [str(key) for key in data if key not in FIELDS]
    if unknown:
        raise ConfigError(f"study {path}: unknown {', '.join(unknown)}; a study has {', '.join(FIELDS)}")
    for name, kind, words in (("models", list, "a list of names"), ("variants", dict, "a mapping of names to settings"), ("suite", list, "a list of suites")):
        if not isinstance(data.get(name), kind) or not data[name]:
            raise ConfigError(f"study {path}: {name} must be {words}")
    variants: dict[str, dict[str, Any]] = {}
    for variant, values in data["variants"].items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(variant)):
            raise ConfigError(f"study {path}: variant {variant!r} names a directory; write it in letters, digits, dots and dashes")
        variants[str(variant)] = _mapping(values, f"study {path}: variant {variant}")
    return Study(
        path=path,
        models=[str(model) for model in data["models"]],
        variants=variants,
        suite=[str(suite) for suite in data["suite"]],
        settings=_mapping(data.get("settings"), f"study {path}: settings"),
    )


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{where}: a mapping of settings to values is wanted")
    found = {str(name).replace("-", "_"): value for name, value in (values or {}).items()}
    for name in found.keys() & {"out", "study", "models", "runs", "compare", "model", "storage_options"}:
        raise ConfigError(f"{where}: {name} is no setting of one variant")
    return found


def pairs(study: Study, settings: EvaluateSettings) -> tuple[list[Pair], list[str]]:
    """(pairs in the order of the study, notes about variants that were left out).

    A setting of the command wins over the study's own, one of a variant over both. Raises ConfigError for settings that cannot work.
    """
    models = settings.models or study.models
    given = {name: getattr(settings, name) for name in settings.model_fields_set - {"study", "models", "out", "model", "runs", "compare"}}
    directories = _directories(models)
    out = (settings.out or OUT).rstrip("/")
    found: list[Pair] = []
    left_out: dict[str, list[str]] = {}
    for model in models:
        for variant, values in study.variants.items():
            resolved = _resolved(values, model, f"study {study.path}: variant {variant}")
            if resolved is None:
                left_out.setdefault(variant, []).append(model)
                continue
            directory = f"{directories[model]}/{variant}"
            common: dict[str, Any] = {"suite": study.suite} | study.settings | given
            try:
                made = EvaluateSettings.make(_with_lists(common | resolved) | {"model": model, "out": f"{out}/{directory}"})
                made.build_representation()
            except ConfigError as error:
                raise ConfigError(f"study {study.path}: {model}, variant {variant}: {error}") from error
            found.append(Pair(model=model, variant=variant, directory=directory, settings=made))
    notes = [f"variant {variant} is left out for {', '.join(named)}: it has values for other models only" for variant, named in left_out.items()]
    if not found:
        raise ConfigError(f"study {study.path}: no variant has values for {', '.join(models)}; give the variant a value for '{DEFAULT}'")
    return found, notes


def _resolved(values: Mapping[str, Any], model: str, where: str) -> dict[str, Any] | None:
    """The values for one model; None where one is for other models only."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            by_model = {str(key): item for key, item in value.items()}
            if model not in by_model and DEFAULT not in by_model:
                return None
            value = by_model.get(model, by_model.get(DEFAULT))
        if name not in ("prompt", "demo", "instruction"):
            value = _filled(value, model, f"{where}: {name}")
        found[name] = value
    return found


def _with_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """One text for a setting that is a list is a list of one, as in a --config file."""
    fields = EvaluateSettings.model_fields
    return {
        name: [value] if isinstance(value, str) and name in fields and get_origin(fields[name].annotation) is list else value for name, value in values.items()
    }


def _filled(value: Any, model: str, where: str) -> Any:
    """With {model} as the model's last name and $NAME as the environment has it."""
    if not isinstance(value, str):
        return value
    value = os.path.expandvars(value.replace("{model}", _last_name(model)))
    missing = re.search(r"\$\{?(\w+)", value)
    if missing:
        raise ConfigError(f"{where}: the environment has no {missing[1]}; set it: {missing[1]}=… llmemb evaluate --study …")
    return value


def _last_name(model: str) -> str:
    return posixpath.basename(model.rstrip("/"))


def _directories(models: Sequence[str]) -> dict[str, str]:
    """A directory's name for each model: its last name, with a digest of the whole name where two models share it."""
    names = {model: re.sub(r"[^A-Za-z0-9._-]+", "-", _last_name(model)).strip("-.") or "model" for model in models}
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {model: f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}" if name in shared else name for model, name in names.items()}


def run(settings: EvaluateSettings, evaluate: Callable[[EvaluateSettings], Evaluation], say: Say = lambda line: None) -> Comparison:
    """Evaluates the pairs of ``settings.study`` into OUT/MODEL/VARIANT, and compares them in OUT/comparison.json.

    With ``contamination`` the texts of the study's suites are looked for once, into OUT/contamination.json. Pairs that failed stand in the
    comparison's ``failed``. Raises ConfigError for a study that cannot work and InputError for training files that cannot be read, before
    anything is evaluated; RunFailed where no pair has an evaluation.
    """
    assert settings.study is not None
    study = load(settings.study, settings)
    chosen, notes = pairs(study, settings)
    storage = Storage(absolute(settings.out or OUT), settings.access)
    for note in notes:
        say(f"note: {note}")
    checked = _contamination(chosen, settings)
    made: dict[str, Evaluation] = {}
    failed: dict[str, str] = {}
    for number, pair in enumerate(chosen, 1):
        found = None
        try:
            found = _evaluated(storage.child(pair.directory), pair, evaluate, functools.partial(_say, say, f"{number}/{len(chosen)} {pair.name}"))
        except LlmembError as error:
            failed[pair.name] = str(error)
        except Exception as error:  # noqa: BLE001 - told at the end; a study of days is not lost for one of its pairs
            failed[pair.name] = f"{type(error).__name__}: {error}"
            say(traceback.format_exc())
        if found is not None:
            made[pair.name] = found
        else:
            say(f"{pair.name} failed: {failed[pair.name]}")
    if not made:
        raise RunFailed("study: no pair could be evaluated:\n" + "\n".join(f"  {name}: {why}" for name, why in failed.items()))
    comparison = compare(list(made.values()), names=list(made))
    contamination = checked.to_dict() if checked else {}
    comparison = replace(comparison, notes=[*notes, *comparison.notes], failed=failed, contamination=contamination)
    storage.put(RESULT, json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False).encode())
    return comparison


def _contamination(chosen: Sequence[Pair], settings: EvaluateSettings) -> Contamination | None:
    """Of all that the pairs are evaluated on, whatever the model; None where no training file is named."""
    training = list(dict.fromkeys(file for pair in chosen for file in pair.settings.contamination))
    if not training:
        return None
    suite = list(dict.fromkeys(name for pair in chosen for name in pair.settings.suite))
    return contaminated(chosen[0].settings.model_copy(update={"contamination": training, "suite": suite, "out": (settings.out or OUT).rstrip("/")}))


def _evaluated(place: Storage, pair: Pair, evaluate: Callable[[EvaluateSettings], Evaluation], say: Say) -> Evaluation:
    """The evaluation that stands in a pair's directory, or a new one. A record that the study did not write is never removed."""
    settings = _decisive(pair.settings)
    mark = _mark(place)
    stands = place.exists(record.PATH)
    if mark is not None and stands:
        same = mark.get("settings") == settings
        earlier = record.load(place.url, pair.settings.access)
        changed = "its settings" if not same else "its weights or tokenizer" if earlier.space != settle(pair.settings).space.digest else ""
        if not changed and mark.get("finished"):
            say("was evaluated before")
            return earlier
        if changed:
            say(f"{changed} changed since it was evaluated, evaluating again")
            place.delete([record.PATH])
        else:
            say("evaluating again, as it was not finished")
    else:
        say("evaluating")
    if mark is not None or not stands:
        _put_mark(place, settings, finished=False)
    found = evaluate(pair.settings.model_copy(update={"contamination": []}))
    _put_mark(place, settings, finished=True)
    return found


def _say(say: Say, head: str, line: str) -> None:
    say(f"{head}: {line}")


def _mark(place: Storage) -> dict[str, Any] | None:
    """None where the study has evaluated nothing here."""
    if not place.exists(SETTINGS):
        return None
    try:
        found = json.loads(place.read(SETTINGS))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _put_mark(place: Storage, settings: dict[str, Any], *, finished: bool) -> None:
    place.put(SETTINGS, json.dumps({"finished": finished, "settings": settings}, indent=1, ensure_ascii=False).encode())


def _decisive(settings: EvaluateSettings) -> dict[str, Any]:
    """The settings that decide the figures, in JSON's types."""
    values = masked(settings.model_dump(mode="json"))
    decisive: dict[str, Any] = json.loads(json.dumps({name: value for name, value in values.items() if name not in NOT_OF_THE_RESULT}))
    return decisive
