-- Raise what a verifier must know to call itself fresh. KEYS: meta, epoch. ARGV: number, nonce, min_reader_format.
-- Returns the min_reader_format that holds now: it is never lowered. writer_format is no lower than it.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end
local held = redis.call('HMGET', KEYS[1], 'min_reader_format', 'writer_format')
if not held[1] then
  return redis.error_reply('TRUST_NO_EPOCH there is no log')
end
local format = math.max(tonumber(held[1]), tonumber(ARGV[3]))
redis.call('HSET', KEYS[1], 'min_reader_format', format, 'writer_format', math.max(format, tonumber(held[2] or '1')))
return format
