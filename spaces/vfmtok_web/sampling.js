/**
 * Drawing image tokens as vfmtok_hf.modeling.generation_vfmtok does: guidance, temperature, top-k, top-p, then one draw
 * from one uniform number. Logits are Float32Array, so the result of each stage is float32; the
 * arithmetic inside is float64.
 */

/**
 * One guidance scale per step: `scale` for all, or up to token `interval + 2`, 1 (none) after. With a `power` it rises
 * from 1 along RAR's power-cosine schedule.
 */
export function guidanceScales(numSteps, { scale, interval = null, power = null }) {
  return Array.from({ length: numSteps }, (_, step) => {
    const limit = interval === null || step < interval + 2 ? Math.max(scale, 1) : 1;
    if (power === null) return limit;
    const height = (1 - Math.cos(Math.PI * (step / numSteps) ** power)) / 2;
    return (limit - 1) * height + 1;
  });
}

/** Classifier-free guidance: unconditional + scale * (conditional - unconditional). */
export function applyGuidance(conditional, unconditional, scale) {
  return conditional.map((logit, token) => logit + (scale - 1) * (logit - unconditional[token]));
}

/** The token with the largest logit, the first of equal ones. */
export function argmax(logits) {
  let best = 0;
  for (let token = 1; token < logits.length; token++) if (logits[token] > logits[best]) best = token;
  return best;
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = logits.map((logit) => Math.exp(Math.fround(logit - largest)));
  const total = Math.fround(powers.reduce((sum, power) => sum + power, 0));
  return powers.map((power) => power / total);
}

/** All but the `topK` largest logits become -Infinity. Ties with the last one stay. */
export function filterTopK(logits, topK) {
  const kthLargest = logits.toSorted()[Math.max(logits.length - topK, 0)];
  return logits.map((logit) => (logit < kthLargest ? -Infinity : logit));
}

/** Keep the most probable tokens up to and including the one that takes their sum above `topP`. */
export function filterTopP(logits, topP) {
  const tokens = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]);
  const probabilities = softmax(Float32Array.from(tokens, (token) => logits[token]));
  const kept = new Float32Array(logits.length).fill(-Infinity);
  let sum = 0;
  for (const [rank, token] of tokens.entries()) {
    if (sum > topP) break;
    kept[token] = logits[token];
    sum += probabilities[rank];
  }
  return kept;
}

/** The first token at which the sum of the probabilities exceeds `number` (in [0, 1]) times their total. */
export function sampleToken(logits, number) {
  const probabilities = softmax(logits);
  const total = probabilities.reduce((sum, probability) => sum + probability, 0);
  let sum = 0;
  let last = 0;
  for (const [token, probability] of probabilities.entries()) {
    sum += probability;
    if (sum > number * total) return token;
    if (probability > 0) last = token;
  }
  return last; // the threshold was rounded up to the total
}

/**
 * One token.
 *
 * @param {Float32Array} logits of the whole codebook.
 * @param {{temperature: number, topK: number, topP: number, doSample: boolean}} settings 0 switches top-k off, 1 top-p.
 * @param {TorchGenerator} generator gives the uniform number.
 */
export function drawToken(logits, { temperature, topK, topP, doSample }, generator) {
  if (!logits.every(Number.isFinite)) throw new Error("The model computed values that are not finite.");
  if (!doSample) return argmax(logits);
  const divisor = Math.fround(temperature);
  let filtered = logits.map((logit) => logit / divisor);
  if (topK > 0) filtered = filterTopK(filtered, topK);
  if (topP < 1) filtered = filterTopP(filtered, topP);
  return sampleToken(filtered, generator.uniform());
}
