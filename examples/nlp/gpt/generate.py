# SPDX-License-Identifier: Apache-2.0
"""Responses to a file of prompts, or, without one, a conversation at the terminal.

python examples/nlp/gpt/generate.py model.restore_from_path=model.nemo \
    input_file=prompts.jsonl output_file=responses.jsonl

The file has {"text": ...}, {"prompt": ...} or {"messages": [{"role": ..., "content": ...}, ...]} on each line.
"""

from pathlib import Path

from nemo_aligner.config.generate import GenerateJob
from nemo_aligner.launch.script import script


@script("generate", GenerateJob)
def main(job: GenerateJob) -> None:
    """Let a language model write."""
    from nemo_aligner import builders
    from nemo_aligner.builders.scores import open_score, text_generator
    from nemo_aligner.data.requests import open_requests

    requests = None if job.input_file is None else open_requests(job.input_file)
    pretrained = builders.load_policy(job)
    generator = text_generator(job, pretrained)
    if requests is None or job.output_file is None:
        generator.converse()
        return
    with open_score(job, pretrained, requests, generator) as rewarding:
        generator.generate_file(
            requests, Path(job.output_file), num_samples=job.num_samples, rewarding=rewarding, top_n=job.top_n
        )


if __name__ == "__main__":
    main()
