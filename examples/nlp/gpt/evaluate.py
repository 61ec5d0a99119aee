# SPDX-License-Identifier: Apache-2.0
"""How often responses to a file of prompts are right: pass@K, the majority's result, and how sure that is.

python examples/nlp/gpt/evaluate.py model.restore_from_path=model.nemo \
    input_file=gsm8k_test.jsonl output_file=responses.jsonl num_samples=8 \
    reward_function=nemo_aligner.environments.rules.gsm8k

Every response is written with its reward, as generate.py does it, and the figures stand beside them.
"""

import json
import sys
from pathlib import Path

from nemo_aligner.config.generate import EvaluateJob
from nemo_aligner.launch.script import script


@script("evaluate", EvaluateJob)
def main(job: EvaluateJob) -> None:
    """Evaluate a language model."""
    from nemo_aligner import builders
    from nemo_aligner.algorithms.evaluation import evaluate
    from nemo_aligner.builders.scores import open_score, text_generator
    from nemo_aligner.data.requests import open_requests
    from nemo_aligner.environments.rules import final_result
    from nemo_aligner.parallel import world

    assert job.input_file is not None
    assert job.output_file is not None
    requests = open_requests(job.input_file)
    pretrained = builders.load_policy(job)
    generator = text_generator(job, pretrained)
    with open_score(job, pretrained, requests, generator) as rewarding:
        rows = generator.generate_file(
            requests, Path(job.output_file), num_samples=job.num_samples, rewarding=rewarding
        )
    groups = [rows[i : i + job.num_samples] for i in range(0, len(rows), job.num_samples)]
    found = evaluate(
        [[row["reward"] for row in group] for group in groups],
        [[final_result(row["answer"]) for row in group] for group in groups],
        right_from=job.right_from,
        pass_at=job.ks,
    )
    if world.is_logging_rank():
        figures = {name: {"mean": one.mean, "half_width": one.half_width} for name, one in found.items()}
        counts = {"prompts": len(groups), "samples": job.num_samples}
        finished = sum(row["finished"] for row in rows) / len(rows)
        whole = counts | {"finished": finished, "figures": figures}
        job.summary_file.write_text(json.dumps(whole, indent=1) + "\n")
        lines = [
            f"{len(groups)} prompts, {job.num_samples} responses to each; {finished:.1%} ended by themselves"
        ]
        lines += [f"{name:<14} {one}" for name, one in found.items()]
        sys.stdout.write("\n".join([*lines, f"figures: {job.summary_file}", ""]))


if __name__ == "__main__":
    main()
