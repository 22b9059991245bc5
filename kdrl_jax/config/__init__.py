"""Every setting of a run: the typed schema, and how YAML and overrides become it."""

from kdrl_jax.config.errors import ConfigError
from kdrl_jax.config.load import differences, load_config, load_run_config, save_config
from kdrl_jax.config.schedules import Schedule
from kdrl_jax.config.schema import (
    ArchitectureConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    JsonlSourceConfig,
    KDConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    SFTConfig,
    SourceConfig,
    TaskSourceConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "ArchitectureConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "JsonlSourceConfig",
    "KDConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RLConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "Schedule",
    "SourceConfig",
    "TaskSourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "differences",
    "load_config",
    "load_run_config",
    "save_config",
]
