/* SPDX-License-Identifier: Apache-2.0 */
/* BCC carries its own copy of this header and includes it first; the file only has to exist. */
