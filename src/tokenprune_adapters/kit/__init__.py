"""Kit for adapters: what an adapter of any model needs, in plain torch.

| module | what it is for |
|---|---|
| `tower_reading` | signals of a vision tower, from hooks on its blocks |
| `query_key_maps` | queries and keys of an attention module, where no hook sees them |
| `attention_rows` | attention rows from queries and keys, without the whole matrix |
| `fingerprint` | a number per picture, by which it is known again |
| `before_projector` | reduction between vision tower and projector |
| `budget_rows` | crops and frames that share one budget |
| `carry` | a value that travels on a tensor from one hook to the next |
| `marks` | dropped tokens in features of full length |
| `prompt_layout` | a prompt without the dropped slots, and back |
| `method_wrapper` | a method that hooks do not reach |
| `peaked_weights`, `budget_by_hand` | vanilla runs for `tokenprune doctor` |

Nothing here knows a model framework. `tokenprune.gather` has the gather of rows.
"""
