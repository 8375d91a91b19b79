"""A file of prompts over a running cluster: `pdmesh batch in.jsonl out.jsonl`.

1. `input_file` reads the whole input once: its digest, how many requests it holds, no custom_id twice.
2. `output_file` takes the output for itself and finds what it holds already; a foreign one is refused. Nothing has been
   sent so far.
3. `runner` keeps a number of requests in flight. `request_line` and `body` make a call of each line, or say why not;
   `patience` decides what is tried again, and when the cluster is given up.
4. `result_line` makes a line of what came of it, `output_file` puts it in its place: into the output when its turn has
   come, until then into a file beside it. So nothing that has finished lies in memory alone.

The formats are those of OpenAI's Batch API: https://platform.openai.com/docs/guides/batch
"""
