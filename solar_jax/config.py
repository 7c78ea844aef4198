"""The typed config tree of a run: defaults, types and checks.

A file under `configs/` returns `defaults()` with some values changed; the command line may change more
(`--config.optimizer.learning_rate=3e-5`). `resolve` turns the result into frozen dataclasses and refuses unknown
keys, wrong types and impossible values before anything is allocated. The dataclasses are the only list of keys.
"""

import dataclasses
import functools

import ml_collections

from solar_jax.config_checks import above_0, at_least, between, named, not_negative
from solar_jax.config_shapes import ModelConfig, ShapeConfig
from solar_jax.config_tree import typed, without_old_keys
from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    operator: str = "dus"  # a name of growth.operators.OPERATORS, or search
    m: int = 8  # dus, zeroed: layers cut from each side of the seam
    a: int = 0  # block_repeat, split: first layer of the block
    b: int = 0  # block_repeat, split: first layer after the block; midas, lidas, stack_last: layers of the block
    every: int = 4  # llama_pro, average, linear_lesa: a new layer after every so many
    copies: int = 2  # naive, interleave: how often each layer stands
    slices: str = ""  # slices: half-open source ranges, e.g. "0:24,8:32"
    blocks: str = ""  # blocks: disjoint source ranges and how often each is visited: "2:20" (twice), "2:8x3,9:12"
    of: str = "dus"  # gated, tied: the operator whose layers they take, with its keys
    beta: float = 0.5  # gated: scale of what second and later visits add; 0: the base's outputs, 1: the operator's
    alpha: float = 0.5  # split: the first twin's scale; the second has 1 - alpha
    inner: str = "copy"  # zeroed: projections that are not 0, copy, mean (of the neighbours) or normal (noise)
    add: int = 0  # search: layers to add, at the place that a search of the training text finds
    experts: int = 0  # experts that each layer's MLP becomes (upcycling); 0: stays one MLP
    top_k: int = 2  # experts of a token
    granularity: int = 1  # shards of the MLP that each expert is split into, G; a token then has G x top_k of them
    routing: str = "renormalised"  # weights of a token's experts: renormalised (Mixtral), or softmax over all
    redrawn: float = 0.0  # share of each expert's channels that is drawn anew (Drop-Upcycling)
    jitter: float = 0.0  # noise on the experts' weights, relative to each
    beside: str = ""  # blocks of another cut, written as `blocks`, that is grown and trained beside on the same tokens
    at_step: int = 0  # growth after so many steps of the base; 0: before training
    schedule: tuple[int, ...] = ()  # later steps after which the operator is applied again (MIDAS, LIDAS, stacking)
    state: str = "copied"  # of new layers' optimiser state at at_step, a name of training.growing.STATES
    rewarm_steps: int = 0  # steps over which the learning rate rises again after growth in a run
    new_rate: float = 1.0  # factor of the learning rate of new layers

    def check(self) -> None:
        not_negative("growth", self, "at_step", "rewarm_steps")
        above_0("growth", self, "new_rate")
        self.check_experts()
        steps = (self.at_step, *self.schedule)
        if self.schedule and (self.at_step < 1 or list(steps) != sorted(set(steps))):
            raise UserError(
                f"config.growth.schedule={self.schedule} must rise from a config.growth.at_step above 0, found "
                f"{self.at_step}."
            )
        if self.beside and self.at_step:
            raise UserError(
                f"config.growth.beside={self.beside!r} needs growth before the first step: config.growth.at_step=0, "
                f"found {self.at_step}."
            )
        for key, value in (("rewarm_steps", self.rewarm_steps), ("state", self.state != "copied" and self.state)):
            if value and not self.at_step:
                raise UserError(f"config.growth.{key}={value!r} needs config.growth.at_step above 0, found 0.")

    def check_experts(self) -> None:
        """Raises a UserError for experts that no model could have."""
        not_negative("growth", self, "experts", "jitter")
        at_least(1, "growth", self, "top_k", "granularity")
        named("growth", self, routing=("renormalised", "softmax"))
        between(0, 1.0001, "growth", self, "redrawn")
        if self.experts and (self.experts < self.top_k or self.at_step or self.experts == 1):
            raise UserError(
                f"config.growth.experts={self.experts} needs at least 2 experts, config.growth.top_k={self.top_k} or "
                f"more, and growth before the first step: config.growth.at_step=0, found {self.at_step}."
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of a run after which the model grows; () if it grows before the first."""
        return (self.at_step, *self.schedule) if self.at_step else ()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # Each entry is "PATH[?text=COLUMN&epochs=N&limit=TOKENS&as=text][:weight]": a file of text, JSONL or JSON (.gz and
    # .zst too), Parquet, Arrow or ArrayRecord, a folder or glob of them, local, in a bucket or on the hub
    # (hf://datasets/...), or what every CPython carries: pydoc-topics, python-stdlib (sources of its library),
    # pydoc-functions (records). Weights are shares of the tokens; of records, multiples of a source's size. ?as=text
    # reads any file as plain text.
    sources: tuple[str, ...] = ("pydoc-topics",)
    text_key: str = "text"  # the JSON key or column of the text, where a source does not say ?text=
    skip_empty: bool = True  # documents whose text is empty or null are skipped and counted; False refuses them
    sequence_length: int = 4096  # T, tokens a row
    holdout_every: int = 8  # one document in so many of each source is held out for evaluation
    holdout: str = "hash"  # which: by the hash of its text, or "position": documents 0, k, 2k, ...
    workers: int = 0  # processes that make batches; 0: a thread
    packing: str = "best_fit"  # documents packed to fill rows; "concat": one stream, cut every T tokens
    mask_documents: bool = True  # tokens see only their own document within a packed row
    # Records: "text", "conversations" (tunes on their answers) or "pairs" (tunes on preferences), whose forms are known
    # by their keys, or one form by its name in data.chat.formats, such as sharegpt or orca_pairs.
    format: str = "text"
    template: str = "tokenizer"  # of conversations: the tokenizer's, solar, chatml, none (plain text), or a Jinja file
    train_on: str = "answers"  # of conversations: answers, last (the last answer), or all
    too_long: str = "cut"  # conversations longer than a row, and sides of a pair longer than half of one: cut or drop
    keep_ties: bool = False  # pairs whose own scores are equal are trained on

    def check(self) -> None:
        """Raises a UserError for values that no run could use; so do the other groups'."""
        at_least(1, "data", self, "sequence_length")
        not_negative("data", self, "workers")
        named("data", self, packing=("best_fit", "concat"), holdout=("hash", "position"))
        named("data", self, train_on=("answers", "last", "all"), too_long=("cut", "drop"))
        if self.format != "text" and self.packing != "best_fit":
            raise UserError(
                f"config.data.format={self.format!r} needs config.data.packing='best_fit', as records stay whole."
            )
        if not self.sources:
            raise UserError("config.data.sources must name at least one text, found ().")
        at_least(2, "data", self, "holdout_every")
        if self.packing == "best_fit" and not self.mask_documents:
            raise UserError(
                "config.data.packing='best_fit' needs config.data.mask_documents=True, as documents that share a row "
                "must not see each other; for False take config.data.packing=concat."
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 0
    batch_size: int = 0  # B, rows a step over all devices
    accumulation: int = 1  # microbatches that one step's batch is split into; 0: chosen by the planner
    trainable: str = "all"  # a name of training.partition.TRAINABLE
    remat: str = "auto"  # a name of model.remat.REMAT; auto: chosen by the planner
    attention: str = "auto"  # flash, streamed (ours), splash (jax's), cudnn, xla (no kernel); auto: what fits
    precision: str = "mixed"  # a name of model.precision.PRECISIONS; mixed: float32 state, bfloat16 matmuls
    offload_collectives: bool = False  # to the SparseCores of v5p and v6e, beside matmuls; not yet run on a TPU
    max_skipped: int = 0  # steps with a non-finite loss or gradient that a run may skip
    spike: float = 0.0  # deviations above the running mean that make a loss a spike; 0: no spike detection
    control: bool = False  # also train the base without growth, on the same tokens
    epochs: float = 0.0  # where steps is 0: passes over the rows of all sources
    compiled: str = ""  # folder of a step that `plan --save` compiled; "": it is compiled at the start
    router_balance: float = 0.01  # weight of the experts' load-balance loss
    router_z: float = 0.001  # weight of the mean square of the router's log-sum-exp

    def check(self) -> None:
        not_negative("train", self, "accumulation", "max_skipped", "spike", "epochs")
        not_negative("train", self, "router_balance", "router_z")
        at_least(0 if self.epochs else 1, "train", self, "steps")
        at_least(1, "train", self, "batch_size")
        if self.batch_size % max(1, self.accumulation):
            raise UserError(
                f"config.train.batch_size={self.batch_size} must be a multiple of "
                f"config.train.accumulation={self.accumulation}."
            )


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    losses: tuple[str, ...] = ("sigmoid",)  # summed; entries NAME[:WEIGHT], names of training.preferences.LOSSES
    beta: float = 0.1  # strength of the pull to the reference; simpo: of the margin
    label_smoothing: float = 0.0  # sigmoid, robust: the share of pairs that may be labelled the wrong way round
    gamma: float = 0.5  # simpo: the margin that it aims at
    chunks: str = ""  # sDPO: source, difficulty:N, random:N or listed:FILE; "": one pass over all pairs
    cache: str = ""  # folder of the reference's log-probabilities, which runs may share; "": reference/ in the run's

    def check(self) -> None:
        above_0("preferences", self, "beta")
        between(0, 0.5, "preferences", self, "label_smoothing")
        not_negative("preferences", self, "gamma")


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = 0  # of adapters that train in place of the layers of config.train.trainable; 0: those themselves train
    alpha: float = 16.0  # the adapter is scaled by alpha / rank
    variant: str = "lora"  # lora, rslora (scaled by alpha / sqrt(rank)) or dora (also trains magnitudes)
    targets: tuple[str, ...] = PROJECTIONS  # projections that have one

    def check(self) -> None:
        not_negative("lora", self, "rank", "alpha")
        named("lora", self, variant=("lora", "rslora", "dora"))
        if not self.targets or set(self.targets) - set(PROJECTIONS):
            raise UserError(f"config.lora.targets must be among {', '.join(PROJECTIONS)}, found {self.targets}.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # a name of training.optimizer.DIRECTIONS
    learning_rate: float = 2e-5  # peak
    schedule: str = "cosine"  # a name of training.optimizer.SCHEDULES
    warmup_steps: int = 0
    warmup_fraction: float = 0.0  # where warmup_steps is 0: the share of the steps that warm-up takes
    final_fraction: float = 0.1  # of the peak, at the last step
    decay_fraction: float = 0.2  # wsd: share of the steps that the final decay takes
    b1: float = 0.9  # of the first moment, or of the only one; adafactor has none
    b2: float = 0.95  # adamw, muon's Adam: of the second moment; lion: of the moment that is kept
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices, not on norm scales
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping

    def check(self) -> None:
        not_negative("optimizer", self, "warmup_steps", "weight_decay", "clip_norm", "learning_rate")
        for key in ("final_fraction", "decay_fraction", "warmup_fraction"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise UserError(f"config.optimizer.{key} must lie between 0 and 1, found {value}.")
        between(0, 1, "optimizer", self, "b1", "b2")  # Adam divides by 1 - b ** t
        above_0("optimizer", self, "eps")  # a gradient of 0 would give 0 / 0


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every: int = 0  # steps between held-out evaluations during training; 0: only before and after
    windows: int = 40  # held-out rows
    batch_size: int = 8  # rows at a time over all devices
    tasks: tuple[str, ...] = ()  # lm-eval's names or h6, measured before and after training; needs the extra `eval`
    task_every: int = 0  # steps between measuring them during training, too
    task_limit: int = 0  # items of each task; 0: all
    task_data: str = ""  # folder of the benchmarks' files, as `evaluate --data` takes it; "": the hub
    task_path: str = ""  # folder of tasks, as `evaluate --include_path` takes it

    def check(self) -> None:
        at_least(1, "evaluation", self, "windows", "batch_size")
        not_negative("evaluation", self, "every", "task_every", "task_limit")
        for key in ("task_every", "task_limit", "task_data", "task_path"):
            if (value := getattr(self, key)) and not self.tasks:
                raise UserError(f"config.evaluation.{key}={value!r} needs config.evaluation.tasks, found none.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes. 0: chosen by the planner; -1, in any but slice: the remaining devices."""

    data: int = 0  # replicas of the parameters
    fsdp: int = 0  # shards of parameters and optimiser state, gathered a layer at a time
    tensor: int = 0  # shards of heads and mlp
    context: int = 0  # shards of a row's tokens, for long rows; they shard the state too
    slice: int = 0  # TPU slices joined by DCN, at least one replica on each; 0: as many as the devices report
    expert: int = 0  # shards of the experts; of rows and all other state as fsdp


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints at multiples of so many steps are kept too; 0: none
    keep_best: int = 0  # checkpoints with the lowest held-out loss that are kept too; 0: none
    restore: str = "blocks"  # checkpoints are read in blocks of chunks; "orbax": by Orbax itself, at half the speed

    def check(self) -> None:
        at_least(1, "checkpoint", self, "every", "keep")
        not_negative("checkpoint", self, "keep_every", "keep_best")
        named("checkpoint", self, restore=("blocks", "orbax"))


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Monitoring of a run; no number of its training depends on it, so a restart may change it."""

    tensorboard: bool = False  # event files in tensorboard/ (package tensorboardX)
    wandb_project: str = ""  # Weights & Biases project (package wandb)
    profile_start: int = 0  # first step of a profile; 0: only on SIGUSR1
    profile_steps: int = 3  # steps of a profile
    watchdog_seconds: float = 600.0  # without a step, and 10 median steps, before stack traces are dumped; 0: never
    compilation_cache: bool = True  # compiled programs are reused at the next start

    def check(self) -> None:
        at_least(1, "logging", self, "profile_steps")
        not_negative("logging", self, "profile_start", "watchdog_seconds")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    dtype: str = "bfloat16"
    max_shard_size: str = "5GB"

    def check(self) -> None:
        named("export", self, dtype=DTYPES)


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = ""
    seed: int = 0
    source: str = ""  # checkpoint to grow: HF folder or hub id, .gguf file, one of our own, smollm2, or scratch
    fallback: str = ""  # the sibling config to name when this one does not fit the machine
    model: ShapeConfig = dataclasses.field(default_factory=ShapeConfig)
    growth: GrowthConfig = GrowthConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    export: ExportConfig = ExportConfig()

    def check(self) -> None:
        for group in (getattr(self, field.name) for field in dataclasses.fields(self)):
            if hasattr(group, "check"):
                group.check()
        if (late := max(self.growth.steps, default=0)) and late >= self.train.steps > 0:
            raise UserError(
                f"config.growth.at_step and schedule must be under config.train.steps={self.train.steps}, found {late}."
            )
        if not self.seed >= 0:
            raise UserError(f"config.seed must be finite and not negative, found {self.seed}.")
        if not self.source:
            raise UserError("config.source must name a checkpoint (HF folder, hub id, .gguf or smollm2), found ''.")
        if self.checkpoint.keep_best and not self.evaluation.every:
            raise UserError(
                f"config.checkpoint.keep_best={self.checkpoint.keep_best} needs held-out losses of checkpoints: a "
                f"config.evaluation.every above 0, found {self.evaluation.every}."
            )


DTYPES = ("float32", "bfloat16", "float16")

# Keys of older config files and runs -> (new name, {old value: new value})
RENAMED = {"train.compute_dtype": ("train.precision", {"float32": "float32", "bfloat16": "mixed"})}
# Keys of older config files and runs that a run has no more: accepted with the default, which they had in every run
DROPPED = {
    f"model.{f.name}": f.default
    for f in dataclasses.fields(ModelConfig)
    if f.name not in {kept.name for kept in dataclasses.fields(ShapeConfig)}
}


def defaults() -> ml_collections.ConfigDict:
    """Every key with its default, for a config file to change."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def resolve(config: ml_collections.ConfigDict) -> Config:
    """The typed tree of a config file's result.

    Raises:
      UserError: a key is unknown, has another type than its default, or an impossible value.
    """
    resolved = typed(Config, without_old_keys(config.to_dict(), RENAMED, DROPPED), "config")
    resolved.check()
    warmup, steps = resolved.optimizer.warmup_steps, resolved.train.steps
    if warmup > steps > 0:  # a shorter run than the recipe's, as for a first try
        _say_once(f"config.optimizer.warmup_steps={warmup} is cut to config.train.steps={steps}")
        resolved = dataclasses.replace(resolved, optimizer=dataclasses.replace(resolved.optimizer, warmup_steps=steps))
    return resolved


@functools.cache
def _say_once(text: str) -> None:
    print(text, flush=True)
