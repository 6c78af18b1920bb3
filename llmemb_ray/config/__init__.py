"""Every setting, once: its type, default, help text and the place in the command's help where it stands.

Invariant: these modules are the one place that refuses a setting by itself. Command line, YAML file and Python
calls all end in these models; the command line's options are made from their fields. They import no torch,
no ray, no transformers.
"""

from llmemb_ray.config.base import (
    ActorSettings,
    ClusterSettings,
    ModelSettings,
    RepresentationSettings,
    Settings,
    StorageSettings,
    WeightsSettings,
    parse_actors,
    setting,
)
from llmemb_ray.config.demonstrations import DemosBuildSettings, DemosSelectSettings
from llmemb_ray.config.embedding import EmbedSettings, ParitySettings, PlanSettings, is_duration, parse_deadline, parse_utilization
from llmemb_ray.config.evaluation import EvaluateSettings
from llmemb_ray.config.generation import GeneratorSettings
from llmemb_ray.config.mining import MineSettings
from llmemb_ray.config.readers import ExportSettings, ReportSettings, SearchSettings, VerifySettings
from llmemb_ray.config.synthesis import SynthesizeSettings
from llmemb_ray.config.training import ExportModelSettings, FinetuneSettings, Source

__all__ = [
    "ActorSettings",
    "ClusterSettings",
    "DemosBuildSettings",
    "DemosSelectSettings",
    "EmbedSettings",
    "EvaluateSettings",
    "ExportModelSettings",
    "ExportSettings",
    "FinetuneSettings",
    "GeneratorSettings",
    "MineSettings",
    "ModelSettings",
    "ParitySettings",
    "PlanSettings",
    "ReportSettings",
    "RepresentationSettings",
    "SearchSettings",
    "Settings",
    "Source",
    "StorageSettings",
    "SynthesizeSettings",
    "VerifySettings",
    "WeightsSettings",
    "is_duration",
    "parse_actors",
    "parse_deadline",
    "parse_utilization",
    "setting",
]
