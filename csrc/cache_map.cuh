// SPDX-License-Identifier: Apache-2.0
// Host side: a tensor map of the keys or values in the paged cache, for the bulk copy engine (TMA).
#pragma once

#include "hopper.cuh"
#include "tensor_map.cuh"

namespace hopper {

// Describe the keys or the values of a cache, which begin at `base`; `a` holds sizes and strides. The coordinates are
// element, token in its page, KV head, page. One copy brings `keys` keys of one page.
template <typename Arguments>
cudaError_t make_cache_map(CUtensorMap* map, Element element, const void* base, const Arguments& a, uint32_t keys) {
    return make_tensor_map<4>(
        map, element, base,
        {uint64_t(a.head_dim), uint64_t(a.page_size), uint64_t(a.num_kv_heads), uint64_t(a.num_pages)},
        {a.stride_token, a.stride_kv_head, a.stride_page}, {box_elements(element, a.head_dim), keys, 1, 1}
    );
}

}  // namespace hopper
