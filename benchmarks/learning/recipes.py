# SPDX-License-Identifier: Apache-2.0
"""The experiments of docs/results.md, in the order of the page."""

import math
from collections.abc import Sequence

from benchmarks.learning import data
from benchmarks.learning.experiment import Experiment, Gate, Job
from examples.quickstart import arithmetic

_ALWAYS = "seed=SEED precision=32 exp_manager.create_tensorboard_logger=False"
_UNSAVED = "exp_manager.create_checkpoint_callback=False"
_LORA = "model.peft.lora_tuning.target_modules=[all] model.peft.lora_tuning.adapter_dim=16 lr=2e-4"


def _supervised(
    name: str, command: str, *, block: str, batch_size: int, steps: int, begins: bool = True
) -> tuple[Job]:
    """A run of SmolLM2 on rows of real data, which validates and saves four times.

    Args:
        begins: whether it validates before the first step too.
    """
    quarter, first = steps // 4, f"trainer.{block}.val_before_train=True " if begins else ""
    return (
        Job(
            name=name,
            command=f"{command} model=SMOLLM2 data=DATA/train.jsonl validation=DATA/validation.jsonl seq_length=192 "
            f"batch_size={batch_size} micro_batch_size=4 epochs=9 max_steps={steps} {_ALWAYS} "
            f"{first}trainer.{block}.val_check_interval={quarter} trainer.{block}.save_interval={quarter} "
            "exp_manager.checkpoint_callback_params.save_top_k=0",
        ),
    )


_UNRELIABLE = Job(
    name="sums",
    command=f"sft model=DATA/base data=DATA/unreliable.jsonl seq_length=32 {_ALWAYS} {_UNSAVED} "
    + " ".join(arithmetic.SFT),
)


def _online(name: str, command: str, *, but: str = "", given: Sequence[str] = arithmetic.GRPO) -> Job:
    """A run of the arithmetic model, which validates before the first step too."""
    settings = " ".join((*given, "trainer.ppo.val_before_train=True"))
    return Job(
        name=name,
        command=f"{command} model=SUMS data=DATA/asked.jsonl validation=DATA/asked.jsonl seq_length=32 "
        f"{_ALWAYS} {_UNSAVED} {settings} "
        f"trainer.ppo.rewards.right.function=examples.quickstart.arithmetic.right {but}".rstrip(),
    )


_STUDENT = Job(
    name="knowledge_distillation",
    command="knowledge_distillation model=DATA/student teacher=SMOLLM2 data=DATA/train.jsonl "
    "validation=DATA/validation.jsonl lr=3e-3 seq_length=192 batch_size=16 micro_batch_size=8 "
    f"max_steps=48 trainer.sft.val_check_interval=12 trainer.sft.val_before_train=True {_ALWAYS} {_UNSAVED}",
)


def _first_update(job: Job) -> Job:
    """One rollout and one update of it, which sees the policy that has written the rollout."""
    return Job(
        name=f"{job.name}_gate",
        command=f"{job.command} trainer.ppo.max_steps=1 trainer.ppo.val_check_interval=0 "
        "trainer.ppo.val_before_train=False model.global_batch_size=512",
    )


def _ratio_gates(name: str) -> tuple[Gate, ...]:
    job = f"{name}_gate"
    return (
        Gate(name="ratio at the first update", job=job, metric="train_optim/ppo_ratio", value=1, within=1e-6),
        Gate(
            name="approx_kl at the first update",
            job=job,
            metric="train_optim/approx_kl",
            value=0,
            within=1e-6,
        ),
    )


_GRPO = _online("grpo", "grpo")
_PPO = _online(
    "ppo",
    "ppo reward_model=SUMS remote_critic_rm.combine_rm_and_critic_server=False "
    "critic.trainer.ppo.combine_rm_and_critic_server=False critic.trainer.precision=32 "
    "critic.trainer.ppo.inference_micro_batch_size=512 critic.trainer.ppo.max_steps=360 critic.model.seed=SEED "
    "critic.model.encoder_seq_length=32 critic.model.global_batch_size=256 critic.model.micro_batch_size=128 "
    "critic.model.optim.lr=1e-3 critic.model.optim.sched.warmup_steps=5 critic.model.optim.sched.constant_steps=0",
)
_SFT_LOSS = {"validation/loss": "validation loss"}
_PAIRS = {"validation/acc": "validation accuracy", **_SFT_LOSS}
_RIGHT = {"val_rollouts/rewards": "share of right responses"}
_ABOUT_SUMS = """\
A Llama of a million weights that was fine-tuned on sums, three in four of them wrong, is rewarded for right ones.
Validation asks each of the hundred sums once."""


def _recipe(name: str, title: str) -> Experiment:
    # The penalty of KL is the recipe's.
    given = [
        word for word in arithmetic.GRPO if not word.startswith("trainer.ppo.initial_policy_kl_penalty=")
    ]
    return Experiment(
        title=title,
        about=f"{_ABOUT_SUMS} As [GRPO](#grpo), by `recipe={name}`.",
        write_data=data.sums,
        jobs=(_UNRELIABLE, _online(name, f"grpo recipe={name}", given=given)),
        figures=_RIGHT,
        seeds=3,
        beside=("grpo",),
    )


EXPERIMENTS = {
    "pretraining": Experiment(
        title="Continued pre-training",
        about="stories260K, a Llama of 264,128 weights, on TinyStories: 40 steps of 8 samples of 256 tokens.",
        write_data=data.stories,
        jobs=(
            Job(
                name="pretraining",
                command="sft model=REAL/stories260k_hf data=DATA/train.txt validation=DATA/validation.txt "
                "model.data.plain_text=True seq_length=256 lr=3e-4 batch_size=8 micro_batch_size=8 max_steps=40 "
                f"trainer.sft.val_check_interval=8 trainer.sft.val_before_train=True {_ALWAYS} {_UNSAVED}",
            ),
        ),
        figures=_SFT_LOSS,
        seeds=3,
    ),
    "sft": Experiment(
        title="Supervised fine-tuning",
        about="SmolLM2-135M-Instruct on Dolly's open questions, 48 steps of 16 rows; validation on 128 other rows.",
        write_data=data.dolly,
        jobs=_supervised("sft", "sft lr=2e-5", block="sft", batch_size=16, steps=48),
        figures=_SFT_LOSS,
    ),
    "lora": Experiment(
        title="LoRA",
        about="As supervised fine-tuning, with adapters of rank 16 on all linear layers.",
        write_data=data.dolly,
        jobs=_supervised(
            "lora", f"sft model.peft.peft_scheme=lora {_LORA}", block="sft", batch_size=16, steps=48
        ),
        figures=_SFT_LOSS,
        seeds=1,
        beside=("qlora", "sft"),
    ),
    "qlora": Experiment(
        title="QLoRA",
        about="As LoRA, with the model's linear layers in four bits.",
        write_data=data.dolly,
        jobs=_supervised(
            "qlora", f"sft model.peft.peft_scheme=qlora {_LORA}", block="sft", batch_size=16, steps=48
        ),
        figures=_SFT_LOSS,
        seeds=1,
        beside=("lora", "sft"),
    ),
    "rm": Experiment(
        title="Reward model",
        about="SmolLM2-135M-Instruct with a new scalar head on pairs of HH-RLHF (harmless), 64 steps of 8 pairs.",
        write_data=data.harmless,
        jobs=_supervised("rm", "rm lr=2e-5", block="rm", batch_size=8, steps=64),
        figures=_PAIRS,
    ),
    "attributes": Experiment(
        title="Attribute model",
        about="SmolLM2-135M-Instruct with a new head on responses that GPT-4 has scored from 1 to 5, 48 steps of 8.",
        write_data=data.rated,
        jobs=_supervised(
            "attributes",
            "rm model.reward_model_type=regression model.regression.num_attributes=1 lr=1e-4",
            block="rm",
            batch_size=8,
            steps=48,
        ),
        figures={"validation/loss": "validation mean squared error"},
        seeds=3,
    ),
    "dpo": Experiment(
        title="DPO",
        about="SmolLM2-135M-Instruct on pairs of HH-RLHF (harmless), 64 steps of 4 pairs.",
        write_data=data.harmless,
        # Before the first step the policy is the reference: ln 2, as the gate says, and no pair is won.
        jobs=_supervised("dpo", "dpo lr=5e-6", block="dpo", batch_size=4, steps=64, begins=False),
        figures=_PAIRS,
        gates=(
            Gate(
                name="loss of the first step, ln 2",
                job="dpo",
                metric="train/preference_loss",
                value=math.log(2),
                within=1e-6,
            ),
        ),
    ),
    "kto": Experiment(
        title="KTO",
        about="SmolLM2-135M-Instruct on single responses of HH-RLHF (harmless), good or bad, 48 steps of 8.",
        write_data=data.rated_singly,
        jobs=_supervised("kto", "kto lr=2e-5", block="kto", batch_size=8, steps=48),
        figures=_SFT_LOSS,
        gates=(Gate(name="loss of the first step", job="kto", metric="train/loss", value=0.5, within=1e-6),),
        seeds=1,
    ),
    "knowledge_distillation": Experiment(
        title="Distillation",
        about="A Llama of 7 million random weights learns from SmolLM2-135M-Instruct on Dolly, 48 steps of 16 rows.",
        write_data=data.dolly_and_student,
        jobs=(_STUDENT,),
        figures={"validation/kd_loss": "validation KL to the teacher, nats per token"},
        seeds=1,
    ),
    "own_responses": Experiment(
        title="Distillation on own responses",
        about="The student of [distillation](#distillation) goes on with 32 responses a step to Dolly's questions, of "
        "at most 32 tokens. Of 64 validation questions the reward is minus the KL to the teacher.",
        write_data=data.dolly_and_student,
        jobs=(
            _STUDENT,
            Job(
                name="own_responses",
                command="on_policy_distillation model=KNOWLEDGE_DISTILLATION teacher=SMOLLM2 "
                "data=DATA/asked_train.jsonl validation=DATA/asked_validation.jsonl lr=3e-4 seq_length=192 "
                f"batch_size=32 micro_batch_size=32 {_ALWAYS} {_UNSAVED} trainer.ppo.max_steps=40 "
                "trainer.ppo.val_check_interval=10 trainer.ppo.val_before_train=True model.ppo.num_rollout_samples=32 "
                "model.ppo.num_val_samples=64 model.ppo.length_params.max_length=32",
            ),
        ),
        figures={"val_rollouts/rewards": "minus the KL to the teacher, nats per token"},
        seeds=1,
    ),
    "grpo": Experiment(
        title="GRPO",
        about=_ABOUT_SUMS,
        write_data=data.sums,
        jobs=(_UNRELIABLE, _first_update(_GRPO), _GRPO),
        figures=_RIGHT,
        gates=_ratio_gates("grpo"),
        beside=("ppo", "rloo", "dr_grpo", "dapo", "reinforce_plus_plus", "gspo", "cispo"),
    ),
    "ppo": Experiment(
        title="PPO",
        about=f"{_ABOUT_SUMS} The critic starts from the fine-tuned model, in a job of its own.",
        write_data=data.sums,
        jobs=(_UNRELIABLE, _first_update(_PPO), _PPO),
        figures=_RIGHT,
        gates=_ratio_gates("ppo"),
        beside=("grpo",),
    ),
    "rloo": _recipe("rloo", "RLOO"),
    "dr_grpo": _recipe("dr_grpo", "Dr. GRPO"),
    "dapo": _recipe("dapo", "DAPO"),
    "reinforce": _recipe("reinforce", "REINFORCE without a baseline"),
    "reinforce_plus_plus": _recipe("reinforce_plus_plus", "REINFORCE++"),
    "gspo": _recipe("gspo", "GSPO"),
    "cispo": _recipe("cispo", "CISPO"),
    "word_game": Experiment(
        title="A game of several turns",
        about="A Llama of a million weights that was fine-tuned on games of guesses at random finds one of seven "
        "words in three guesses; each [reply](environments.md) says on which side of the guess it stands in the "
        "alphabet. Guesses at random find it in 37 % of the games, halving the list in all. Validation plays 32 games "
        "of each word.",
        write_data=data.word_game,
        jobs=(
            Job(
                name="games",
                command=f"sft model=DATA/base data=DATA/games.jsonl seq_length=32 {_ALWAYS} {_UNSAVED} "
                + " ".join(word for word in arithmetic.SFT if "max_epochs" not in word)
                + " trainer.sft.max_epochs=2",
            ),
            Job(
                name="word_game",
                command="grpo model=GAMES data=DATA/asked.jsonl validation=DATA/validation.jsonl seq_length=32 "
                f"{_ALWAYS} {_UNSAVED} lr=6e-4 model.optim.sched.warmup_steps=5 model.optim.sched.name=CosineAnnealing "
                "model.optim.sched.constant_steps=0 model.optim.sched.min_lr=2e-5 batch_size=224 micro_batch_size=224 "
                "trainer.ppo.initial_policy_kl_penalty=0 trainer.ppo.max_steps=120 trainer.ppo.max_epochs=1000 "
                "trainer.ppo.val_check_interval=20 trainer.ppo.val_before_train=True model.ppo.entropy_bonus=0.015 "
                "model.ppo.num_rollout_samples=448 model.ppo.num_responses_per_prompt=64 "
                "model.ppo.rollout_micro_batch_size=448 model.ppo.num_val_samples=224 "
                "model.ppo.val_rollout_micro_batch_size=224 max_length=12 "
                "'model.ppo.sampling_params.end_strings=[\".\"]' "
                "trainer.ppo.rewards.game.environment=nemo_aligner.environments.word_game.Guess "
                '\'trainer.ppo.rewards.game.arguments={replies: ["<", ">", "!"]}\' '
                f"trainer.ppo.rewards.game.max_turns={data.TURNS}",
            ),
        ),
        figures={"val_rollouts/rewards": "share of games that are won"},
        seeds=3,
    ),
    "rs": Experiment(
        title="Rejection sampling",
        about=f"{_ABOUT_SUMS} The best of sixteen responses is learned from.",
        write_data=data.sums,
        jobs=(_UNRELIABLE, _online("rs", "rs")),
        figures=_RIGHT,
        seeds=3,
        beside=("grpo",),
    ),
    "online_dpo": Experiment(
        title="Online DPO",
        about=f"{_ABOUT_SUMS} The best and the worst of sixteen responses are a pair.",
        write_data=data.sums,
        jobs=(
            _UNRELIABLE,
            _online(
                "online_dpo",
                "online_dpo",
                but="model.ppo.entropy_bonus=0 model.global_batch_size=32 model.micro_batch_size=32",
            ),
        ),
        figures=_RIGHT,
        seeds=3,
        beside=("grpo",),
    ),
    "on_policy_distillation": Experiment(
        title="On-policy distillation",
        about="The model that was fine-tuned on unreliable sums learns from the one that GRPO has made of it.",
        write_data=data.sums,
        jobs=(_UNRELIABLE, _GRPO, _online("on_policy_distillation", "on_policy_distillation teacher=GRPO")),
        figures=_RIGHT,
        seeds=3,
        beside=("grpo",),
    ),
    "spin": Experiment(
        title="SPIN",
        about="The model that was fine-tuned on unreliable sums plays against itself for the hundred right ones.",
        write_data=data.sums,
        jobs=(
            _UNRELIABLE,
            Job(
                name="spin",
                command="spin model=SUMS data=DATA/right.jsonl validation=DATA/right.jsonl seq_length=32 "
                "'model.data.train_ds.prompt_template={input}{output}' batch_size=100 micro_batch_size=100 lr=2e-4 "
                "trainer.spin.max_iterations=2 trainer.spin.max_epochs=20 trainer.spin.val_check_interval=5 "
                "trainer.spin.val_before_train=True "
                f"{_ALWAYS} {_UNSAVED}",
            ),
        ),
        figures={"validation/loss": "negative log-likelihood of the right sums"},
        seeds=3,
    ),
}
