// The numbers that one call of attention carries: the one list that Python (spec.Params), the CPU handler and the CUDA
// kernels share. `int` and `float` are 32 bits wide in all of them; this file includes nothing, for NVRTC reads it too.
//
// Rows of Q lie in an array (q_groups, q_rows, heads, head_dim), rows of K and V in (kv_groups, kv_rows, kv_heads,
// head_dim or head_dim_v). A dense group is one sequence; a packed group holds several, cut by cu_seqlens. With a page
// table a group of K and V is a page.
#pragma once

#define JAX_FLASH_PARAMS(X)                                                         \
  X(int, batch)                /* sequences in all groups */                        \
  X(int, heads)                /* query heads */                                    \
  X(int, kv_heads)             /* key/value heads; divides heads */                 \
  X(int, head_dim)             /* of Q and K */                                     \
  X(int, head_dim_v)           /* of V and the output */                            \
  X(int, q_groups)             /* equals batch unless Q is packed */                \
  X(int, q_rows)               /* query rows of one group */                        \
  X(int, kv_groups)            /* equals batch where K and V are dense, no cache */ \
  X(int, kv_rows)              /* key rows of one group */                          \
  X(int, scale_batch_stride)   /* strides of scale (B or 1, H or 1) in elements; */ \
  X(int, scale_head_stride)    /* 0 where one entry serves all */                   \
  X(int, v_scale_batch_stride) /* of v_scale (B or 1, Hk or 1) */                   \
  X(int, v_scale_head_stride)                                                       \
  X(int, sinks_batch_stride) /* of sinks (B or 1, H) */                             \
  X(int, window_left)        /* keys seen before a query's own position; -1: all */ \
  X(int, window_right)       /* keys seen after it; -1: all, 0: causal */           \
  X(float, softcap)          /* score = softcap * tanh(score / softcap); 0: off */  \
  X(int, max_pages)          /* of a sequence; 0: no page table */

namespace jax_flash {

struct Params {
#define JAX_FLASH_DECLARE(type, name) type name;
  JAX_FLASH_PARAMS(JAX_FLASH_DECLARE)
#undef JAX_FLASH_DECLARE
};

}  // namespace jax_flash
