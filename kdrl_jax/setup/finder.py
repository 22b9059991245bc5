"""Where a config's models and tokenizers are, before anything of them is on a device."""

from kdrl_jax.checkpoint import MisfitError
from kdrl_jax.config import Config, ModelConfig, TokenizerConfig, load_run_config
from kdrl_jax.data.tokenizer import Tokenizer, load_tokenizer
from kdrl_jax.models.load import ModelSource, open_model
from kdrl_jax.runs import Role, model_of, run_of
from kdrl_jax.setup.parameters import Found, load_run, newest_step, recorded_step
from kdrl_jax.types import Params


class Finder:
    """Opens a model's file once for its tokenizer and its weights, and a tokenizer once for all."""

    def __init__(self) -> None:
        self._sources: dict[ModelConfig, ModelSource] = {}
        self._tokenizers: dict[tuple[TokenizerConfig, str | None], Tokenizer] = {}

    def tokenizer(self, config: TokenizerConfig, path: str | None = None) -> Tokenizer:
        key = (config, path)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(config, path)
        return self._tokenizers[key]

    def own_tokenizer(self, config: Config, role: Role) -> Tokenizer | None:
        """The tokenizer beside a model's weights, or of the run that trained it."""
        model, run = model_of(config, role), run_of(config, role)
        if run is not None:
            trained = load_run_config(run)
            if trained.tokenizer.kind != "model":
                return self.tokenizer(trained.tokenizer)
            return self.own_tokenizer(trained, "student")
        if model.path is None:
            return None
        return self.tokenizer(TokenizerConfig(), self._open(model).tokenizer_path)

    def find(self, config: Config, role: Role, num_tokens: int) -> Found:
        """Where a model's config and parameters come from.

        Args:
            num_tokens: vocabulary of a model with random weights.
        """
        model, run = model_of(config, role), run_of(config, role)
        if run is not None:
            trained = load_run_config(run)
            inner, recorded = self.find(trained, "student", num_tokens), recorded_step(config, role)
            # Once: a run that is trained on meanwhile has a newer one when its model is loaded.
            step = newest_step(run) if recorded is None else recorded

            def load_recorded(abstract: Params) -> Params:
                try:
                    return load_run(run, trained, inner, abstract, step)
                except MisfitError:
                    raise
                except ValueError as error:
                    if recorded is None:
                        raise
                    raise ValueError(
                        f"{config.run_dir} was begun with step {step} of {run} as its {role}, and goes on "
                        f"with no other: {error}; put that checkpoint back, or begin in another log.dir"
                    ) from error

            return Found(inner.config, load_recorded, inner.source, run_step=step)
        source = self._open(model) if model.path is not None else open_model(model, num_tokens)
        load = source.load if source.has_weights else None
        return Found(source.config, load, source, loads_int8=True)

    def _open(self, model: ModelConfig) -> ModelSource:
        if model not in self._sources:
            self._sources[model] = open_model(model)
        return self._sources[model]


def choose_tokenizer(config: Config, finder: Finder, own: dict[Role, Tokenizer | None]) -> Tokenizer:
    """The run's: the one that the config names, or else the first that a model brings, the student's before
    the teachers'.

    Raises:
        ValueError: there is none, or a text of rollout.stop is none to it.
    """
    if config.tokenizer.kind != "model":
        tokenizer: Tokenizer | None = finder.tokenizer(config.tokenizer)
    else:
        tokenizer = next((t for t in own.values() if t is not None), None)
    if tokenizer is None:
        raise ValueError(
            "tokenizer.kind=model takes the tokenizer of a model, but student and teacher have random "
            "weights; set tokenizer.kind to char, or to file with tokenizer.path"
        )
    if special := set(config.rollout.stop) & set(tokenizer.special_strings):
        raise ValueError(
            f"rollout.stop holds {', '.join(map(repr, sorted(special)))}, which is a special token: no "
            "completion's text has it; leave it out (the tokenizer's end tokens end completions anyway)"
        )
    return tokenizer
