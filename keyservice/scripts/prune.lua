#!lua flags=allow-oom
-- Name fewer epochs. KEYS: epoch. ARGV: number, nonce, then the chain as it was read and as it shall be, then what is
-- known beside it, likewise. Returns how many links the chain has now. The last link, the current epoch's, stays as it is.
local refusal = check_epoch(KEYS[1], ARGV[1], ARGV[2])
if refusal then
  return refusal
end
local held = redis.call('HMGET', KEYS[1], 'chain', 'known', 'open')
if held[3] ~= '1' then
  return redis.error_reply('TRUST_CLOSED the epoch is not open')
end
if held[1] ~= ARGV[3] or (held[2] or '[]') ~= ARGV[5] then
  return redis.error_reply('TRUST_REV the chain has changed')
end

local chain = cjson.decode(ARGV[4])
local last = chain[#chain]
if not last or last.nonce ~= ARGV[2] or string.format('%.0f', last.number) ~= ARGV[1] then
  return redis.error_reply('TRUST_STATE the chain must end with the current epoch')
end
redis.call('HSET', KEYS[1], 'chain', ARGV[4])
if held[2] then
  redis.call('HSET', KEYS[1], 'known', ARGV[6])
end
return #chain
