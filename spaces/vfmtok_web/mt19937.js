/**
 * The Mersenne Twister of torch's CPU generator (MT19937; Matsumoto and Nishimura, 1998), so that a seed means here what
 * `torch.Generator().manual_seed(seed)` means in Python.
 */

const LENGTH = 624;
const OFFSET = 397;
const MATRIX = 0x9908b0df;
const UPPER_BIT = 0x80000000;
const LOWER_BITS = 0x7fffffff;

export class TorchGenerator {
  /** @param {number} seed an integer from 0 to 2^53 - 1, of which, as in torch, the low 32 bits count. */
  constructor(seed) {
    this.state = new Uint32Array(LENGTH);
    this.state[0] = seed % 2 ** 32;
    for (let index = 1; index < LENGTH; index++) {
      const previous = this.state[index - 1];
      this.state[index] = Math.imul(previous ^ (previous >>> 30), 1812433253) + index;
    }
    this.position = LENGTH;
  }

  /** The next 32 random bits. */
  bits() {
    if (this.position === LENGTH) this.#refill();
    let bits = this.state[this.position++];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    return (bits ^ (bits >>> 18)) >>> 0;
  }

  /** The next number of `torch.rand(..., dtype=torch.float64)`: 53 random bits, the upper ones first. */
  uniform() {
    const upper = this.bits() & 0x1fffff;
    return (upper * 2 ** 32 + this.bits()) * 2 ** -53;
  }

  #refill() {
    const { state } = this;
    for (let index = 0; index < LENGTH; index++) {
      const joined = (state[index] & UPPER_BIT) | (state[(index + 1) % LENGTH] & LOWER_BITS);
      state[index] = state[(index + OFFSET) % LENGTH] ^ (joined >>> 1) ^ (joined & 1 ? MATRIX : 0);
    }
    this.position = 0;
  }
}
