/* SPDX-License-Identifier: Apache-2.0 */
/* BPF_RINGBUF_OUTPUT multiplies its size by the page size; the loader passes the machine's own. */
#ifndef PAGE_SIZE
#error "compile with -DPAGE_SIZE=<bytes of a page on this machine>"
#endif
