// SPDX-License-Identifier: Apache-2.0
// Host side: a request's keys or values in their pages, for the bulk copy engine.
#pragma once

#include "hopper.cuh"
#include "tensor_map.cuh"

namespace hopper {

// Describe the keys or the values of a cache; they begin at `base`, and `a` holds sizes and strides. Coordinates are
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
