"""The sections of a spec about optimisation: `training`, `retrieval` and `checkpoint`."""

from typing import Annotated, Literal

from pydantic import Field

from internvl_api.spec.deepspeed import DeepSpeed
from internvl_api.spec.model import Freeze
from internvl_api.types import ApiModel

Method = Literal["full", "lora", "head", "none"]
Precision = Literal["bf16", "fp32"]
MOST = 2**20  # far beyond any run; the operator searches all smaller values for those that fit the GPUs
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Packing(ApiModel):
    """Several rows in one sequence that do not attend to each other: no padding, and equal work for every rank."""

    enabled: bool = Field(False, description="Pack rows into sequences")
    max_tokens: int = Field(16384, ge=16, description="Maximum tokens in a pack (upstream's max_packed_tokens)")
    max_tiles: int = Field(48, ge=1, description="Maximum tiles in a pack (upstream's num_images_expected)")
    buffer_size: int = Field(
        20, ge=1, le=1000, description="Number of packs filled at the same time (upstream's max_buffer_size)"
    )


class EarlyStopping(ApiModel):
    """End training when the loss on data.validation stops falling."""

    metric: Literal["validationLoss"] = Field(
        "validationLoss", description="What must improve: validationLoss, the mean loss on data.validation, by falling"
    )
    patience: int = Field(
        3, ge=1, le=1000, description="Number of validations in a row without an improvement, after which training ends"
    )
    min_delta: float = Field(
        0.0,
        ge=0.0,
        lt=1000.0,
        description="A loss is an improvement when it is lower by more than this than the last improvement",
    )


class Samples(ApiModel):
    """Answers to a few held-out rows during training, for a person to look at."""

    every_steps: int = Field(
        100, ge=1, description="Number of steps between two rounds of answers; also at the start and at the end"
    )
    rows: int = Field(
        4, ge=1, le=16, description="Number of rows of data.validation, drawn once by training.seed and always the same"
    )
    max_new_tokens: int = Field(64, ge=1, le=256, description="Maximum tokens of an answer; decoding is greedy")


class Training(ApiModel):
    """Optimisation settings."""

    epochs: float = Field(1.0, gt=0.0, description="Number of passes over the training data")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Maximum number of steps; training ends earlier when epochs are done. With packing it replaces "
        "epochs, as in upstream",
    )
    learning_rate: float = Field(1e-5, gt=0.0, lt=1.0, description="Peak learning rate of AdamW")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate changes after the warm-up"
    )
    warmup_ratio: float = Field(
        0.03, ge=0.0, lt=1.0, description="Part of all steps in which the learning rate rises to its peak"
    )
    warmup_steps: int | None = Field(None, ge=0, description="Number of warm-up steps; overrides warmupRatio")
    weight_decay: float = Field(0.01, ge=0.0, le=1.0, description="Weight decay of AdamW")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="beta1 and beta2 of AdamW")
    adam_epsilon: float = Field(1e-8, gt=0.0, description="Epsilon of AdamW")
    max_grad_norm: float = Field(1.0, ge=0.0, description="Maximum norm of the gradient; 0 disables clipping")
    global_batch_size: int = Field(
        16, ge=1, le=MOST, description="Samples (with packing: packs) in one optimizer step, over all ranks"
    )
    micro_batch_size: int = Field(
        1, ge=1, le=MOST, description="Samples (with packing: packs) in one forward pass of one rank"
    )
    max_tokens_per_micro_batch: int | None = Field(
        None,
        ge=16,
        le=MOST,
        description="Maximum tokens in one forward pass of one rank: a micro batch then holds at most microBatchSize "
        "rows and as many as fit these tokens, by the sizes that preflight counts. At least maxSeqLength; not with "
        "packing. Default: no maximum",
    )
    max_seq_length: int = Field(
        8192, ge=16, le=MOST, description="Maximum tokens in a row; preflight reports longer rows as findings"
    )
    precision: Precision = Field(
        "bf16", description="Number format of weights and activations; the optimizer state is always fp32"
    )
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass, to save GPU memory"
    )
    group_by_length: bool = Field(False, description="Batch rows of similar length, so that ranks have equal work")
    packing: Packing = Field(default_factory=Packing)
    loss_weighting: Literal["token", "sample", "square"] = Field(
        "token",
        description="Weight of a token in a row with n supervised tokens: 1, 1/n or 1/sqrt(n) "
        "(upstream's loss_reduction)",
    )
    zero_stage: Literal[1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage: 1 shards the optimizer state, 2 also gradients, 3 also weights"
    )
    deepspeed: DeepSpeed = Field(
        default_factory=DeepSpeed, description="Settings merged over the generated DeepSpeed configuration"
    )
    seed: int = Field(42, ge=0, description="Seed of the data order and of new weights")
    data_workers: int = Field(
        4, ge=0, le=64, description="Number of processes that decode and tokenize for each rank; 0: the rank itself"
    )
    freeze: Freeze = Field(default_factory=Freeze)
    early_stopping: EarlyStopping | None = Field(
        None,
        description="End training, as after its last step, when the loss on data.validation stops falling; default: "
        "train all steps",
    )
    samples: Samples | None = Field(
        None,
        description="Answer a few rows of data.validation during training, for the report and TensorBoard; default: "
        "none. Chat models with zeroStage 1 or 2 only",
    )


class Retrieval(ApiModel):
    """Settings of contrastive training, for retrieval models only."""

    layer_decay: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Factor of the learning rate for each layer below the top (upstream's VIT_LAYER_DECAY_RATE and "
        "QLLAMA_LAYER_DECAY_RATE)",
    )
    hard_negatives: bool = Field(
        False,
        description="Draw each image's negative caption from the same forward pass by similarity, instead of at random",
    )


class Checkpoint(ApiModel):
    """Resumable checkpoints of training."""

    every_steps: int = Field(200, ge=1, description="Number of steps between two checkpoints")
    keep: int = Field(2, ge=1, le=100, description="Number of verified checkpoints to keep; older ones are deleted")
    last_step: Literal["weights", "full"] = Field(
        "weights",
        description="What the checkpoint after the last step holds: weights, which the export after a crash needs, or "
        "full, with the optimizer's state",
    )
    after_success: Literal["keep", "delete"] = Field(
        "keep",
        description="What publish does with checkpoints once the result is published: keep the newest (with keepBest, "
        "also the best), or delete all",
    )
    keep_best: bool = Field(
        False,
        description="Keep the checkpoint with the lowest loss on data.validation and export its weights, instead of "
        "those of the last step; each new lowest loss saves a checkpoint",
    )
