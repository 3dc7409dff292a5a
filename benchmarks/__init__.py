"""Paired measurements of ftlib against another library, with proof that both did the same work.

    python -m benchmarks sft --baseline trl --pairs 3

How a comparison is made:

- *Same work.* One set of token ids and labels, one order, one adapter initialisation per pair of runs.
  Both sides load them, and what each side's batches really held is hashed and compared, step by step.
- *Paired runs.* Every run is a fresh process; the sides take turns. The ratio is taken within each pair.
- *Same losses*, where both train on the same tokens. Per step, in the dtype of the timed runs and in a
  short float32 run; after training, one neutral evaluator (plain transformers and peft) scores the adapters
  that both sides saved. Of completions that each side draws, length, reward and updates must be the same.
- *Proof of training.* Every step has a gradient, the adapter moved, the base weights did not.

    __main__    the command line; options: what it says, checked
    driver      which process runs when; writes the result after every run
    jobs        what it asks of those processes; child: how they answer
    tasks/      one file per task: its data, its sides, its evaluator; pairs: what two of them share
    environments/   one file of pins for each baseline that needs other versions, made on first use
    sides       one training run of either library, whatever the task
    materials   what every task prepares; smoke: a tiny model
    machine     what the machine is and can do; floor: the least time a step can take on it
    recorder    times, resources and batches of one training run; rollouts: of one that draws its data
    records     the shape of the result file
    summary     ratios, ranges and checks from the runs; drawn: checks where each side draws its own data
    table       the result as Markdown
"""
