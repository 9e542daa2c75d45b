"""How good predictions are: the field's metrics for each task, from plain lists to numbers.

    task        function                             numbers (mean or total of the rows)
    summarize   score_summaries                      rouge1, rouge2, rougeL, rougeLsum
    answer      score_answers                        exact_match, f1 (SQuAD 2.0)
    classify    score_classes                        accuracy, macro_f1
                score_label_sets (several labels)    exact_match, micro_f1, macro_f1
                score_values (a number per row)      mse, pearson, spearman
    tag         score_spans                          precision, recall, f1, macro_f1 of entities
    choose      score_choices                        accuracy
    fill        score_rankings (ranked tokens)       recall@k, mrr
                score_perplexity                     perplexity, bits_per_byte
    embed       rank_documents, score_rankings       recall@k, mrr
                score_values (of similarities)       mse, pearson, spearman

Every function takes predictions and references, row by row, and returns `Scores`. Shares are
fractions from 0 to 1; publications often print them times 100. A prediction that is None is a row
that failed: it counts as an empty prediction and `Scores.num_failed` counts it. Where nothing can
stand for a number (values, perplexity), the row is left out and its scores are an empty dict. A
reference is never None: leave out the rows that have none.

    scores = score_summaries(["A short summary."], ["The summary."])
    print(scores.summary["rouge1"], scores.per_row[0]["rougeLsum"])

ROUGE, classes, correlations and BIO tags are computed by rouge-score, scikit-learn, scipy and
seqeval: `pip install 'longhaul[metrics]'`. They are imported when they are used, and nothing is
downloaded.

Raises: ShapeError when predictions and references do not fit together or hold what cannot be
    scored; ConfigError when a library is not installed or an option is out of its range.
"""

from longformer_core.metrics.labels import (
    score_choices,
    score_classes,
    score_label_sets,
    score_spans,
    spans_of_tags,
)
from longformer_core.metrics.numbers import score_perplexity, score_values
from longformer_core.metrics.rankings import rank_documents, score_rankings
from longformer_core.metrics.scores import Scores
from longformer_core.metrics.texts import score_answers, score_summaries, split_sentences

__all__ = [
    "Scores",
    "rank_documents",
    "score_answers",
    "score_choices",
    "score_classes",
    "score_label_sets",
    "score_perplexity",
    "score_rankings",
    "score_spans",
    "score_summaries",
    "score_values",
    "spans_of_tags",
    "split_sentences",
]
