"""Every setting of a run: the typed schema, and how YAML and overrides become it."""

from kdrl_jax.config.changes import Change, changes
from kdrl_jax.config.commands import (
    COMMANDS,
    EvalOptions,
    ExportOptions,
    ReportOptions,
    SampleOptions,
    options_help,
    read_options,
)
from kdrl_jax.config.data import DataConfig, JsonlSourceConfig, SourceConfig, TaskSourceConfig
from kdrl_jax.config.errors import ConfigError
from kdrl_jax.config.load import config_for_model, load_config, load_run_config, save_config
from kdrl_jax.config.models import ArchitectureConfig, LoRAConfig, ModelConfig, TokenizerConfig
from kdrl_jax.config.objective import Denominator, EntropyConfig, KDConfig, RefConfig, RLConfig, SFTConfig
from kdrl_jax.config.schedules import Schedule
from kdrl_jax.config.schema import (
    AlarmsConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)

__all__ = [
    "COMMANDS",
    "AlarmsConfig",
    "ArchitectureConfig",
    "Change",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Denominator",
    "EntropyConfig",
    "EvalConfig",
    "EvalOptions",
    "ExportOptions",
    "JsonlSourceConfig",
    "KDConfig",
    "LoRAConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RLConfig",
    "RefConfig",
    "ReportOptions",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "SampleOptions",
    "Schedule",
    "SourceConfig",
    "TaskSourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "changes",
    "config_for_model",
    "load_config",
    "load_run_config",
    "options_help",
    "read_options",
    "save_config",
]
