"""y + s·B·A·x as one step of autograd: what it keeps is x, A·x and, with dropout, one bit an element; and the same in plain operations.

Products with a side of length r are formed as (r, tokens): BLAS is up to eight times slower at the other orientations. The adapter's products
are accumulated in its own dtype, float32 by default, and their sum with the base's output is rounded once; activations are kept in the dtype in
which they came.
"""

from .add_low_rank import add_low_rank as add_low_rank
from .add_product import add_product as add_product
from .add_scaled import add_scaled as add_scaled
from .dora_linear import dora_linear as dora_linear
from .dora_rows import dora_by_rows as dora_by_rows
from .dora_rows import dora_rows as dora_rows
from .low_rank_linear import low_rank_linear as low_rank_linear
from .record_low_rank import record_low_rank as record_low_rank
