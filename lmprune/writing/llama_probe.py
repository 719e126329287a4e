"""Run by the Python of a llama.cpp binding, apart from lmprune: what a GGUF model gives as the next tokens.

``python llama_probe.py model.gguf`` reads ``{"prompts": [[ids], ...], "tokens": n, "said": id}`` from stdin and prints
one list of [token id, log probability] for each prompt as JSON: the n likeliest next tokens. ``said`` is a token of
whole letters that is generated whatever the chances are: of one that is none llama.cpp tells none. Needs xllamacpp and
nothing of ours.
"""

import json
import sys


def main() -> None:
    """The whole program."""
    import xllamacpp  # type: ignore[import-not-found]  # in another environment than ours

    asked = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = max(len(prompt) for prompt in asked["prompts"]) + 8
    params.n_gpu_layers = 0
    params.warmup = False
    params.cpuparams.n_threads = 1
    params.n_parallel = 1
    server = xllamacpp.Server(params)
    found = []
    for prompt in asked["prompts"]:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": 1,
                "n_probs": asked["tokens"],
                "temperature": 0.0,
                "cache_prompt": False,
                "ignore_eos": True,
                "logit_bias": [[asked["said"], 1000.0]],
            }
        )
        (choice,) = answer["choices"]
        first = choice["logprobs"]["content"][0]["top_logprobs"]
        found.append([[item["id"], item["logprob"]] for item in first])
    print(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    except Exception as exc:  # whatever it is, in one line where llama.cpp does not write
        sys.exit(print(f"{type(exc).__name__}: {exc}") or 1)
